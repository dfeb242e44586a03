"""A join that is fed second by second."""

from __future__ import annotations

from schemas.behaviours import Behaviour
from tests.factories.samples import DAY0, DIM
from trainer.samples.catalogue import Catalogue
from trainer.samples.config import JoinConfig
from trainer.samples.join_rules import JoinRules
from trainer.samples.rows import Impression
from trainer.samples.searches import SearchUse
from trainer.samples.window import Observed


class Timeline:
    """Feeds a join with seconds, as the window would."""

    def __init__(self, **over: float) -> None:
        self.catalogue = Catalogue(DIM)
        self.rules = JoinRules.of(self.config(**over), [0])
        self.join = self.rules.join(self.catalogue, searches=SearchUse.RAW)
        self.rows: list[Impression] = []
        self.offset = 0

    @staticmethod
    def config(**over: float) -> JoinConfig:
        """Small numbers, and no corrections."""
        usual = {"history_length": 3, "attribution_seconds": 10, "max_users": 100, "correction_megabytes": 0}
        return JoinConfig.model_validate(usual | over)

    def second(self, second: int, *events: Behaviour) -> None:
        observed = [Observed(0, self.offset + n, DAY0 + second, event) for n, event in enumerate(events)]
        self.offset += len(events)
        self.rows += self.join.resolved(DAY0 + second)
        if observed:
            self.join.add_second(sorted(observed, key=lambda event: event.order))

    def end(self) -> list[Impression]:
        self.rows += self.join.resolved(float("inf"))
        return self.rows

    def history(self, row: Impression) -> list[str]:
        return [self.catalogue.item_id(item) for item in row.history]

    def corrected(self) -> list[str]:
        return [row.event_id for row in self.join.corrections()]
