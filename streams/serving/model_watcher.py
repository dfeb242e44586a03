"""The serving model: follows the pointer of the model registry and swaps without a failed request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from schemas.errors import PipelineError, StoreUnavailable
from schemas.manifests import ModelManifest, running_number
from streams.broker.clients import BrokerConfig, broker_errors, make_consumer
from streams.serving.reports import ModelReport
from streams.stores.artifacts.registry import ModelRegistry
from trainer.networks.item_rows import ItemRows, RequestMoment

if TYPE_CHECKING:
    from torch import Tensor

log = structlog.get_logger()

RETRY_REFUSED_SECONDS = 30.0
"""A release that could not be loaded is tried again this often: its folder may have been restored."""

POINTER_FOLLOWS_SECONDS = 0.3
"""A trainer gives notice just before it moves the pointer, so a second refresh follows a notice."""


class ScoringModel(Protocol):
    """What serving needs of a model. Safe to call from several threads."""

    @property
    def history_length(self) -> int:
        """How many of a user's newest takes count."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of takes that have outputs of their own, beside that of any take."""
        ...

    @property
    def reads_queries(self) -> bool:
        """Whether it was taught what users search."""
        ...

    def prepare(self, items: ItemRows, candidates: int, moment: RequestMoment | None = None) -> Any:
        """What `probabilities` reads of a request: the first `candidates` items, and the history after them, oldest
        first. Without a `moment` nothing is known of what was taken.
        """
        ...

    def probabilities(self, batch: Any) -> NDArray[np.float64]:
        """Probability of each candidate, and those of `kinds`, shape (candidates, 1 + K)."""
        ...

    def features_of(self, batch: Any) -> NDArray[np.float32]:
        """The features that they are computed from, shape (candidates, F)."""
        ...


MakeScorer = Callable[[Mapping[str, "Tensor"], ModelManifest], ScoringModel]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded release. A request uses the one that is current at its start, whatever is swapped meanwhile."""

    scorer: ScoringModel
    manifest: ModelManifest


class Refusal(NamedTuple):
    """Why a release cannot serve: `damaged`, `wrong_encoder` or `wrong_features`, and the details."""

    outcome: str
    why: str


class ModelWatcher:
    """Holds the serving model. A release that cannot be loaded is reported, and the one before goes on serving."""

    def __init__(
        self,
        store: ModelRegistry,
        make_scorer: MakeScorer,
        *,
        encoder_version: str,
        features: str,
        poll_seconds: float,
        on_report: Callable[[ModelReport], None] = lambda report: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Releases have to go with vectors of `encoder_version`, and read the features of the version `features`."""
        self._store = store
        self._make_scorer = make_scorer
        self._encoder_version = encoder_version
        self._features = features
        self._poll_seconds = poll_seconds
        self._on_report = on_report
        self._monotonic = monotonic
        self._wake = asyncio.Event()
        self._refused: str | None = None
        self._refused_until = float("-inf")
        self.current: ServedModel | None = None
        """The serving model; None before the first release."""
        self.problem: str | None = None
        """Why the newest release does not serve, if it does not."""

    def wake(self) -> None:
        """Refresh now rather than at the next poll."""
        self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Refresh every few seconds, and at each `wake`, until `stop` is set."""
        while not stop.is_set():
            self._wake.clear()
            await self.refresh()
            try:
                await asyncio.wait_for(self._wake.wait(), self._poll_seconds)
            except TimeoutError:
                continue

    async def refresh(self) -> None:
        """Load the current release if it is another one. Never raises because of a damaged release."""
        try:
            pointer = await asyncio.to_thread(self._store.current)
            if pointer is None:
                return
            if self.current is not None and pointer.release_id == self.current.manifest.release_id:
                self.problem = self._refused = None
                return
            started = self._monotonic()
            if pointer.release_id == self._refused and started < self._refused_until:
                return
            loaded = await asyncio.to_thread(self._load, pointer.release_id)
        except StoreUnavailable as error:
            if self.problem != str(error):
                log.warning("serve.model_unavailable", error=str(error))
            self.problem = str(error)
            return
        except PipelineError as error:  # the pointer itself is damaged
            if self.problem != str(error):
                log.error("serve.model_refused", error=str(error))
                self._on_report(ModelReport("damaged", 0))
            self.problem = str(error)
            return
        number = running_number(pointer.release_id)
        if isinstance(loaded, Refusal):
            self._refused, self._refused_until = pointer.release_id, self._monotonic() + RETRY_REFUSED_SECONDS
            if self.problem != loaded.why:
                self._on_report(ModelReport(loaded.outcome, number))
                log.error("serve.model_refused", release_id=pointer.release_id, error=loaded.why)
            self.problem = loaded.why
            return
        seconds = self._monotonic() - started
        self.current, self.problem, self._refused = loaded, None, None
        self._on_report(ModelReport("loaded", number, loaded.manifest.rows_trained, seconds))
        log.info("serve.model_loaded", release_id=pointer.release_id, seconds=round(seconds, 3))

    def _load(self, release_id: str) -> ServedModel | Refusal:
        """Load, build and try out one release."""
        try:
            weights, manifest = self._store.load(release_id)
            if manifest.encoder_version != self._encoder_version:
                return Refusal(
                    "wrong_encoder",
                    f"release {release_id} goes with vectors of encoder {manifest.encoder_version}, the center holds "
                    f"{self._encoder_version}",
                )
            if manifest.features != self._features:
                return Refusal(
                    "wrong_features",
                    f"release {release_id} reads features {manifest.features or 'of an earlier build'}, this server "
                    f"computes {self._features}: start it with the trainer's version of mimstream and its "
                    "MIM_TRAINER__FEATURES__... settings, or train again with those of this server",
                )
            scorer = self._make_scorer(weights, manifest)
            tried = scorer.probabilities(scorer.prepare(ItemRows.of(["a candidate"], {}, manifest.dim), 1))
        except StoreUnavailable:
            raise
        except PipelineError as error:
            return Refusal("damaged", str(error))
        except Exception as error:  # whatever a damaged release does, the model before goes on serving
            return Refusal("damaged", f"release {release_id} cannot be built: {error!r}")
        if tried.shape != (1, 1 + len(scorer.kinds)) or not np.isfinite(tried).all():
            return Refusal("damaged", f"release {release_id} answers {tried!r}")
        return ServedModel(scorer, manifest)


async def follow_notices(
    watcher: ModelWatcher, broker: BrokerConfig, topic: str, stop: asyncio.Event, *, retry_seconds: float = 2.0
) -> None:
    """Wake the watcher at each record of `models`. Only a shortcut: without a broker, polling goes on."""
    while not stop.is_set():
        consumer: Any = make_consumer(broker, topic, auto_offset_reset="latest")
        try:
            with broker_errors(broker):
                await consumer.start()
                while not stop.is_set():
                    if await consumer.getmany(timeout_ms=500):
                        watcher.wake()
                        await asyncio.sleep(POINTER_FOLLOWS_SECONDS)
                        watcher.wake()
        except PipelineError as error:
            log.warning("serve.notices_held", error=str(error))
            await asyncio.sleep(retry_seconds)
        finally:
            await consumer.stop()
