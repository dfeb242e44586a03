"""Takes that wait to be counted: how many may, and what is counted when they are more."""

from __future__ import annotations

import pytest

from tests.factories.feeding import observe_all, pump, through_bytes
from tests.factories.samples import behaviour, make_trainer, small_config
from trainer.online.uncounted_takes import UncountedTakes
from trainer.samples.rows import Take


def waiting(*seconds: int) -> UncountedTakes:
    takes = UncountedTakes()
    takes.add(Take(second, f"u{n}", n + 1, 100 + n, announces=n % 2 == 1) for n, second in enumerate(seconds))
    return takes


@pytest.mark.parametrize(
    ("seconds", "most", "before"),
    [
        ((1, 1, 2, 3, 3), 5, None),
        ((1, 1, 2, 3, 3), 4, 3),
        ((1, 1, 2, 3, 3), 2, 2),
        ((1, 1, 2, 3, 3), 1, 2),
        ((1, 1, 1), 1, None),
        ((), 0, None),
    ],
)
def test_whole_seconds_are_due_once_more_takes_wait_than_may(
    seconds: tuple[int, ...], most: int, before: int | None
) -> None:
    assert waiting(*seconds).due(most) == before


def test_takes_of_earlier_seconds_leave_with_all_that_is_known_of_them_also_after_a_restart() -> None:
    again = UncountedTakes()
    again.restore(through_bytes(waiting(1, 2, 3, 3).snapshot().frozen()))
    for takes in (waiting(1, 2, 3, 3), again):
        counted = takes.pop(3)
        assert (counted.item_T.tolist(), counted.second_T.tolist()) == ([1, 2], [1, 2])
        assert (counted.event_T.tolist(), counted.announces_T.tolist()) == ([100, 101], [False, True])
        assert list(takes.items()) == [3, 4] and len(set(counted.user_T.tolist())) == 2
        takes.forget("u3")
        assert list(takes.items()) == [3]


def test_a_number_that_was_taken_is_known_while_an_uncounted_take_names_it() -> None:
    config = small_config(
        batch_rows=2, lateness_seconds=0, attribution_seconds=0, window_takes=1, bank_takes=1, history_length=1
    )
    trainer = make_trainer(config)
    log = [behaviour(f"t{n}", "click", user="taker", item=f"i{n}", second=1) for n in range(1, 5)]
    log += [behaviour(f"x{n}", user="viewer", item=f"i{8 + n}", second=n) for n in range(2)]
    observe_all(trainer, [*sorted(log, key=lambda event: event.occurred_at), behaviour("end", user="v", second=60)])
    pump(trainer)
    numbers = sorted(trainer._uncounted.items())
    held = {*trainer._memory.items(), *trainer.intake.items_in_use()}
    assert len(numbers) == 4 and set(numbers) - held, "takes of the second of the newest row"
    trainer.catalogue.retire([])
    trainer.begin_next()
    assert sorted(map(trainer.catalogue.item_id, numbers)) == ["i1", "i2", "i3", "i4"]
    gone = next(number for number in range(1, 20) if number not in {*numbers, *held})
    with pytest.raises(KeyError):
        trainer.catalogue.item_id(gone)
