"""Which records of which log an erasure covers."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from schemas.forgotten import ForgottenUser
from trainer.samples.forgotten import ForgottenUsers


def request(ends: dict[int, int], *, user: str = "u", cluster: str = "c", topic: str = "t") -> ForgottenUser:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return ForgottenUser(user_id=user, forgotten_at=at, cluster_id=cluster, topic_id=topic, ends=ends)


def erased(users: ForgottenUsers, user: str = "u") -> list[int]:
    """The first record of each of three partitions that is not erased."""
    return [next(offset for offset in range(99) if not users.erases(user, number, offset)) for number in range(3)]


def test_each_partition_is_erased_up_to_the_end_that_was_named_for_it_and_for_that_user_alone() -> None:
    users = ForgottenUsers("c", "t")
    assert not users.erases("u", 0, 0)
    assert users.add(request({0: 5, 1: 1}))
    assert erased(users) == [5, 1, 0] and erased(users, "v") == [0, 0, 0] and len(users) == 1


def test_an_earlier_end_takes_nothing_back_and_a_later_one_erases_more_of_its_partition_only() -> None:
    users = ForgottenUsers("c", "t")
    users.add(request({0: 5, 1: 7}))
    assert not users.add(request({0: 3, 1: 7})) and erased(users) == [5, 7, 0]
    assert users.add(request({0: 2, 1: 9, 2: 1})) and erased(users) == [5, 9, 1]


@pytest.mark.parametrize("other", [{"cluster": "d"}, {"topic": "s"}])
def test_a_request_that_concerns_another_log_erases_nothing(other: dict[str, str]) -> None:
    users = ForgottenUsers("c", "t")
    assert not users.add(request({0: 5}, **other)) and erased(users) == [0, 0, 0] and not len(users)


def test_requests_survive_a_restart_without_the_names_of_users() -> None:
    users, again = ForgottenUsers("c", "t"), ForgottenUsers("c", "t")
    users.add(request({0: 5, 2: 3}, user="somebody"))
    users.add(request({1: 2}, user="another"))
    kept = json.dumps(users.snapshot())
    assert "somebody" not in kept
    again.restore(json.loads(kept))
    assert erased(again, "somebody") == [5, 0, 3] and erased(again, "another") == [0, 2, 0]
