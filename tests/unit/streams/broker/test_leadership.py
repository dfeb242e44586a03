"""Elections: which member of the group gets the role, and what Kafka's refusals mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from aiokafka import errors as kafka_errors

from schemas.errors import Fenced
from schemas.manifests import Fence
from streams.broker.clients import BrokerConfig, broker_errors
from streams.broker.leadership import Leadership, _KeepsTheLeader


class Cluster:
    """One topic of one partition."""

    def partitions_for_topic(self, topic: str) -> set[int]:
        return {0}


def member(fence: Fence | None) -> _KeepsTheLeader:
    leadership = Leadership(BrokerConfig(), group="g", topic="models", transactional_id="g")
    leadership.fence = fence
    return _KeepsTheLeader(leadership)


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_the_newest_term_keeps_the_role_also_with_a_smaller_producer_id(names: str) -> None:
    earlier, newest = Fence(producer_id=1000, epoch=1, term=4), Fence(producer_id=1, epoch=0, term=5)
    fences = dict(zip(names, (earlier, newest), strict=True)) | {"z": None}
    members = {name: member(fence).metadata(["models"]) for name, fence in fences.items()}
    assigned = member(None).assign(Cluster(), members)
    assert [name for name in assigned if assigned[name].assignment] == [names[1]]


def test_the_member_that_was_chosen_before_stays_unless_another_holds_a_newer_term() -> None:
    def assigned(**fences: Fence | None) -> list[str]:
        members = {name: member(fence) for name, fence in fences.items()}
        members["a"]._leadership._assigned(True)
        metadata = {name: one.metadata(["models"]) for name, one in members.items()}
        return [name for name, its in member(None).assign(Cluster(), metadata).items() if its.assignment]

    assert assigned(a=None, b=None) == ["a"]
    held = Fence(producer_id=1, epoch=0, term=4)
    assert assigned(a=held, b=held) == ["a"]
    assert assigned(a=held, b=held.model_copy(update={"term": 5})) == ["b"]


def _wrapped() -> Exception:
    error = kafka_errors.KafkaError("Unexpected error during batch delivery")
    error.__cause__ = kafka_errors.InvalidProducerIdMapping()
    return error


@pytest.mark.parametrize(
    "refusal",
    [kafka_errors.ProducerFenced, kafka_errors.InvalidProducerIdMapping, _wrapped],
    ids=lambda one: one.__name__,
)
def test_a_producer_whose_transactional_id_has_another_producer_id_is_fenced(refusal: Callable[[], Exception]) -> None:
    with pytest.raises(Fenced, match="took over"), broker_errors(BrokerConfig()):
        raise refusal()
