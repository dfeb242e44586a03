"""Where batches are cut, and what is read twice, changes nothing in the end."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories.item_path import PICTURE_URL, ItemPath, b64, picture

EVENTS = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.sampled_from(["publish", "url", "only-url", "delete", "bad", "only-bad", "price"])
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(events=EVENTS, cuts=st.sets(st.integers(0, 14)), replay_from=st.integers(0, 14))
def test_batching_and_replaying_do_not_change_where_it_ends(
    events: list[tuple[str, str]], cuts: set[int], replay_from: int
) -> None:
    async def final(cuts: set[int], replay_from: int | None) -> dict[str, Any]:
        path = ItemPath()
        records = []
        for n, (key, what) in enumerate(events):
            if what == "delete":
                records.append(path.delete(key))
            elif what == "bad":
                records.append(path.publish(key, title="bad", image=b64(b"broken")))
            elif what == "only-bad":
                records.append(path.publish(key, image=b64(b"broken")))
            elif what == "only-url":
                records.append(path.publish(key, image_url=f"{PICTURE_URL}?{n}"))
            elif what == "url":
                records.append(path.publish(key, title=f"t{n}", image_url=f"{PICTURE_URL}?{n}"))
            else:
                records.append(path.publish(key, title="same" if what == "price" else f"t{n}", price=float(n)))
        bounds = [0, *sorted(cut for cut in cuts if cut < len(records)), len(records)]
        for start, end in pairwise(bounds):
            await path.index_all(*records[start:end])
        if replay_from is not None:
            await path.index_all(*records[replay_from:])
        for retry in list(path.outbox.retries):
            path.web[str(retry.item.image_url)] = picture("blue")
        for retry in list(path.outbox.retries):
            await path.retry(retry)
        return {
            key: (row.title, row.vector.tolist(), row.source_offset, row.price, row.first_price, row.has_image)
            for key, row in path.rows.items()
        }

    plain = asyncio.run(final(set(range(15)), None))
    assert asyncio.run(final(cuts, None)) == plain
    assert asyncio.run(final(cuts, replay_from)) == plain
