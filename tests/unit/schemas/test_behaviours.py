"""Kinds of behaviours, and what belongs together in one."""

import pytest
from pydantic import ValidationError

from schemas.behaviours import Behaviour, BehaviourKind


def test_kinds_that_are_takes() -> None:
    assert [kind.value for kind in BehaviourKind if kind.is_take] == ["click", "cart", "purchase"]


@pytest.mark.parametrize("source", [{"drawn_from": "t1"}, {"drawn_at": "2024-05-01T00:00:00Z"}])
def test_the_source_of_a_drawn_exposure_has_an_event_and_a_time(source: dict[str, str]) -> None:
    event = {"event_id": "e", "kind": "exposure", "user_id": "u", "item_id": "i", "occurred_at": "2024-05-01T00:00:00Z"}
    assert Behaviour.model_validate(event).drawn_from is None
    with pytest.raises(ValidationError, match="drawn_from and drawn_at come together"):
        Behaviour.model_validate(event | source)
