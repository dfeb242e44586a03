"""What is loaded ahead of its turn: only what a batch seems to need."""

from __future__ import annotations

from streams.indexing.config import IndexConfig
from streams.indexing.prefetch import decode_batch, prefetch
from tests.factories.item_path import ItemPath


async def test_nothing_is_loaded_ahead_for_what_is_older_unchanged_deleted_or_about_to_change(path: ItemPath) -> None:
    older = path.publish("older", title="old")
    await path.index_all(path.publish("older", title="new"), path.publish("unchanged", title="x", price=3.0))
    await path.index_all(path.publish("cheaper", title="x", price=3.0))
    await path.index_all(path.publish("cheaper", title="x", price=2.0))
    encoded = path.encoder.encoded
    records = [
        older,
        path.publish("unchanged", title="x", price=2.0),
        path.publish("cheaper", title="x", price=2.0),
        path.delete("deleted"),
        path.publish("unwritten", title="x"),
        path.publish("needed", title="y"),
    ]
    batch = decode_batch(path.context, records)
    await prefetch(path.context, batch, {"unwritten"})
    ((place, prediction),) = batch.predictions.items()
    assert place == (0, records[-1].offset) and path.encoder.encoded == encoded + 1
    assert prediction.vector is not None and prediction.price is None


def test_outcomes_are_left_out_of_an_item_as_it_is_decoded() -> None:
    path = ItemPath(IndexConfig(outcomes=("clicks",)))
    (change,) = decode_batch(
        path.context, [path.publish("a", title="x", attributes={"clicks": 7, "colour": "red"})]
    ).changes
    assert change.item is not None and change.item.attributes == {"colour": "red"}
