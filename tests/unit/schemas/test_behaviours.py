"""Kinds of behaviours."""

from schemas.behaviours import BehaviourKind


def test_kinds_that_are_takes() -> None:
    assert [kind.value for kind in BehaviourKind if kind.is_take] == ["click", "cart", "purchase"]
