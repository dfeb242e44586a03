from __future__ import annotations

from tests.factories.feeding import finish, is_balanced, observe_all, pump, through_bytes
from tests.factories.samples import DAY0, behaviour, make_trainer, small_config
from trainer.online.config import TrainerConfig
from trainer.online.intake import EventIntake
from trainer.online.remembered_items import RememberedItems
from trainer.samples.catalogue import Catalogue


def test_default_settings_hold_twenty_thousand_events_a_second_with_full_histories() -> None:
    config = TrainerConfig()
    intake = EventIntake(config, Catalogue(8), [0])
    offset, most, rate = 0, 0, 50
    for second in range(300):
        for n in range(rate):
            kind = "click" if n % 10 == 0 else "exposure"
            event = behaviour(f"e{offset}", kind, user=f"u{n % 5}", item=f"i{n}", second=second)
            intake.observe(0, offset, event)
            offset += 1
        intake.advance()
        while batch := intake._ready and [intake._ready.popleft()]:  # as if each row were trained on at once
            intake.trained(batch)
        most = max(most, intake.pending_bytes)
    assert intake.pending > 100 * rate
    assert most * 20_000 / rate < 1e6 * config.pending_megabytes


def test_memory_of_pending_events_is_accounted_for_to_the_last_byte_over_restart_and_forgetting() -> None:
    config = small_config(lateness_seconds=30)
    trainer = make_trainer(config)
    log = [behaviour(f"x{n}", user=f"u{n % 4}", item=f"i{n % 9}", second=n) for n in range(60)]
    observe_all(trainer, log)
    pump(trainer)
    again = make_trainer(config)
    again.restore(through_bytes(trainer.snapshot()))
    assert again.intake.pending_bytes == trainer.intake.pending_bytes > 0
    for one in (trainer, again):
        before = one.intake.pending_bytes
        one.forget("u1")
        assert 0 < one.intake.pending_bytes < before
        finish(one)
        assert one.intake.pending_bytes == 0 and is_balanced(one.intake.counts)


def test_queued_takes_of_a_forgotten_user_are_no_negatives_and_hold_no_offset() -> None:
    trainer = make_trainer(small_config(batch_rows=4, lateness_seconds=0, attribution_seconds=0))
    log = [behaviour("t0", "click", user="u1", item="i1", second=0)]
    log += [behaviour("t1", "click", user="u2", item="i2", second=1)]
    log += [behaviour(f"x{n}", user="u2", item=f"i{n}", second=2 + n) for n in range(6)]
    observe_all(trainer, log)
    trainer.intake.advance()
    trainer.forget("u1")
    assert [take.user_id for take in trainer.intake.takes_until(10**12)] == ["u2"]
    finish(trainer)
    assert trainer.intake.offsets.trained_offsets() == {0: len(log)}


def test_queued_takes_come_back_with_all_that_is_known_of_them_and_an_end_before_does_not_count() -> None:
    trainer = make_trainer(small_config(batch_rows=4, lateness_seconds=0, attribution_seconds=0))
    log = [behaviour("t0", "click", user="u1", item="i1", second=0, defines_publish=True)]
    log += [behaviour("t1", "cart", user="u2", item="i2", second=1), behaviour("t2", "click", user="u3", second=3)]
    observe_all(trainer, log)
    trainer.intake.finish()
    trainer.intake.advance()
    again = make_trainer(small_config(batch_rows=4, lateness_seconds=0, attribution_seconds=0))
    again.intake.finish()
    again.restore(through_bytes(trainer.snapshot()))
    assert not again.intake._finished
    assert again.intake.takes_until(DAY0) == trainer.intake.takes_until(DAY0) != []
    ours, theirs = again.intake.takes_until(10**12), trainer.intake.takes_until(10**12)
    assert ours == theirs and len(ours) == 2
    assert again.intake.offsets.trained_offsets() == trainer.intake.offsets.trained_offsets() == {0: 3}


def test_the_newest_items_are_remembered_in_their_bounds() -> None:
    items = RememberedItems(2)
    for item_id in ("a", "b", "a"):
        items.add(item_id)
    assert list(items) == ["b", "a"]
    items.add("c")
    assert list(items) == ["a", "c"] and "b" not in items
    again = RememberedItems(2)
    again.add("old")
    again.restore(["x", "a", "c"])
    assert list(again) == ["a", "c"]
