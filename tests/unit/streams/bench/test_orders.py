"""What benchmarks refuse to measure, and whose turn counts."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from schemas.errors import Misconfigured
from streams.bench import encode, score, train
from streams.settings import Settings


def call(benchmark: Any, *given: str) -> None:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    benchmark.run(parser.parse_args(given), Settings())


LONGEST = Settings().behaviours.history_length


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--candidates", "0"), "--candidates"),
        (("--candidates", "11", "--items", "10"), "--candidates"),
        (("--candidates", str(score.MAX_CANDIDATES + 1)), "--candidates"),
        (("--history", "0"), "--history"),
        (("--history", str(LONGEST + 1)), "MIM_BEHAVIOURS__HISTORY_LENGTH"),
        (("--requests", "0"), "--requests"),
    ],
)
def test_questions_that_no_server_would_take_are_not_asked(given: tuple[str, ...], told: str) -> None:
    with pytest.raises(Misconfigured, match=told):
        call(score, *given)


def test_questions_at_the_limits_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def getloadavg() -> Any:
        raise Started

    monkeypatch.setattr("streams.bench.score.os.getloadavg", getloadavg)
    for given in (("--candidates", "1", "--items", "1"), ("--history", str(LONGEST), "--requests", "1")):
        with pytest.raises(Started):
            call(score, *given)


def test_too_few_items_for_one_cell_are_refused_with_how_many_it_takes() -> None:
    with pytest.raises(Misconfigured, match="--items 127: at least 128 are needed"):
        call(encode, "--items", "127")


def test_contenders_run_in_turns() -> None:
    order: list[str] = []

    def timed(name: str) -> Any:
        return lambda: order.append(name) or float(len(order))

    times = train._in_turns({"a": timed("a"), "b": timed("b")})
    assert order == ["a", "b"] * train.ROUNDS and train.ROUNDS > 1
    assert times["a"] == [float(n) for n in range(1, 2 * train.ROUNDS, 2)]
