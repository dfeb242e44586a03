"""Trainers are ordered by the term that they claim, not by the ids that Kafka gives to their producers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from schemas.errors import Fenced, StoreUnavailable
from schemas.manifests import Fence
from streams.stores.artifacts.checkpoints import CheckpointStore
from streams.stores.artifacts.registry import ModelRegistry, in_memory_registry
from streams.training.claim import claim_term
from tests.factories.checkpoints import make_meta, make_state, make_store
from tests.factories.releases import publish, release

Steps = Callable[[], Awaitable[None]]


class Kafka:
    """Hands the role out; whoever had it before can prove nothing any more."""

    def __init__(self) -> None:
        self.newest: Leads | None = None

    def elect(self, producer_id: int, epoch: int, *, once_proved: Steps | None = None) -> Leads:
        self.newest = Leads(self, Fence(producer_id=producer_id, epoch=epoch), once_proved)
        return self.newest


class Leads:
    """A leadership; `once_proved` runs right after its first proof."""

    def __init__(self, kafka: Kafka, fence: Fence, once_proved: Steps | None) -> None:
        self.kafka, self.fence, self.once_proved = kafka, fence, once_proved

    async def prove(self) -> None:
        if self.kafka.newest is not self:
            raise Fenced("another process leads")
        if self.once_proved is not None:
            then, self.once_proved = self.once_proved, None
            await then()

    def claimed(self, term: int) -> Fence:
        self.fence = self.fence.model_copy(update={"term": term})
        return self.fence


class Place:
    """Stores that trainers share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry: ModelRegistry = in_memory_registry()

    @property
    def checkpoints(self) -> CheckpointStore:
        return make_store(self.folder, keep=9)

    async def claim(self, leads: Leads) -> Fence:
        return await claim_term(leads, self.checkpoints, self.registry)  # type: ignore[arg-type]

    def write(self, fence: Fence) -> str:
        return self.checkpoints.write(make_state(1), make_meta(1), fence).snapshot_id

    def rewrite(self, **changes: object) -> None:
        """Change the pointer of the snapshots behind the stores' back."""
        path = self.folder / "current.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_a_newer_trainer_with_a_smaller_producer_id_takes_over(place: Place) -> None:
    kafka = Kafka()
    old = await place.claim(kafka.elect(1000, 1))
    place.write(old)
    release(place.registry, 1, old)
    new = await place.claim(kafka.elect(1, 0))
    assert new.term > old.term
    place.write(new)
    place.registry.take_over(new)
    late = publish(place.registry, 2)
    with pytest.raises(Fenced, match=r"term .*it claims the next term"):
        place.registry.promote(late, old)
    with pytest.raises(Fenced):
        place.write(old)
    place.registry.promote(late, new)


async def test_a_trainer_that_was_replaced_while_it_claimed_claims_nothing(place: Place) -> None:
    kafka, successor = Kafka(), []

    async def replaced() -> None:
        successor.append(await place.claim(kafka.elect(1, 0)))

    with pytest.raises(Fenced):
        await place.claim(kafka.elect(1000, 1, once_proved=replaced))
    place.write(successor[0])  # its claim stands: the late one neither replaced it nor stands above it


async def test_the_one_of_two_starters_that_was_elected_last_claims_last(place: Place) -> None:
    kafka = Kafka()
    swaps: list[Fence] = []

    async def first_goes_on() -> None:
        # the first had seen and proved before the second was elected, and swaps only now
        fence = first.fence.model_copy(update={"term": 1 + seen.term})
        assert place.checkpoints.claim(fence, seen=seen)
        swaps.append(fence)

    first = kafka.elect(1000, 1)
    seen = place.checkpoints.last_claim()
    await first.prove()
    second = await place.claim(kafka.elect(1, 0, once_proved=first_goes_on))
    assert second.term > swaps[0].term
    with pytest.raises(Fenced):
        place.write(swaps[0])
    place.write(second)


async def test_pointers_of_versions_without_terms_are_taken_over(place: Place) -> None:
    earlier = Fence(producer_id=1000, epoch=7)
    place.write(earlier)
    release(place.registry, 1, earlier)
    place.rewrite(fence={"producer_id": 1000, "epoch": 7})
    fence = await place.claim(Kafka().elect(3, 0))
    place.write(fence)
    place.registry.take_over(fence)
    with pytest.raises(Fenced):
        place.write(earlier)


async def test_terms_go_on_after_a_version_without_them_has_written(place: Place) -> None:
    kafka = Kafka()
    first = await place.claim(kafka.elect(5, 0))
    place.write(first)
    sequence = json.loads((place.folder / "current.json").read_text())["sequence"]
    place.rewrite(fence={"producer_id": 5, "epoch": 1}, sequence=sequence + 1)
    assert (await place.claim(kafka.elect(5, 2))).term > first.term


async def test_an_empty_snapshot_folder_does_not_lock_out_of_the_releases(place: Place, tmp_path: Path) -> None:
    kafka = Kafka()
    for epoch in range(3):
        fence = await place.claim(kafka.elect(5, epoch))
    release(place.registry, 1, fence)
    place.folder = tmp_path / "anew"
    place.registry.take_over(await place.claim(kafka.elect(1, 0)))


async def test_a_store_that_is_away_during_the_claim_ends_it_and_the_next_one_succeeds(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka = Kafka()
    first = await place.claim(kafka.elect(5, 0))
    with monkeypatch.context() as patched:

        def away(*_: object) -> None:
            raise StoreUnavailable("store", "away")

        patched.setattr(ModelRegistry, "last_term", away)
        with pytest.raises(StoreUnavailable):
            await place.claim(kafka.elect(5, 1))
    assert (await place.claim(kafka.elect(5, 2))).term > first.term


async def test_a_claim_is_no_snapshot_to_resume_from(place: Place) -> None:
    await place.claim(Kafka().elect(5, 0))
    assert place.checkpoints.current_id() is None and place.checkpoints.kept() == []
