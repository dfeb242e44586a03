from __future__ import annotations

import bisect
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from streams.training.event_times import EventTimes


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 7), st.integers(-1, 52), st.integers(0, 10))
def test_the_span_of_a_moment_holds_the_first_event_that_reaches_it(
    times: list[int], stride: int, moment: int, first: int
) -> None:
    first = min(first, len(times))
    index = EventTimes("t")
    newest = list(accumulate(times[first:], max))
    for place in range(stride, len(newest) + 1, stride):
        index.add(0, first + place, newest[place - 1])
    kept = EventTimes.parse(index.dump(), "t")
    assert kept.dump() == index.dump()
    start, stop = kept.span(0, moment, first, len(times))
    found = next((n for n in range(start, stop) if times[n] >= moment), stop)
    assert found == first + bisect.bisect_left(newest, moment)
    assert stop - start <= max(stride, len(times) - kept.indexed_below(0))


def test_an_index_of_another_topic_or_a_damaged_one_is_made_again() -> None:
    index = EventTimes("t")
    index.add(3, 1000, 12.5)
    assert EventTimes.parse(index.dump(), "t").indexed_below(3) == 1000
    assert EventTimes.parse(index.dump(), "u").indexed_below(3) == 0
    for damaged in ("", "{", "[]", '{"topic_id": "t"}', '{"topic_id": "t", "partitions": {"0": {}}}'):
        assert EventTimes.parse(damaged, "t").indexed_below(0) == 0
