"""Pictures that come after their items, fetched by `mimstream index` from a site whose pictures a test uploads."""

from __future__ import annotations

import asyncio

from streams.settings import Settings
from tests.factories.index_worker import Start, start_index
from tests.factories.item_feed import announced, assert_ends_with_the_last_word, center, feeding, held
from tests.factories.item_path import picture
from tests.factories.picture_site import PictureSite
from tests.factories.topics import read_all
from tests.factories.waiting import until


async def test_a_late_picture_is_added_and_a_delete_wins_over_it_also_after_a_kill(
    settings: Settings, process: Start, pictures: PictureSite
) -> None:
    env = {
        "MIM_IMAGES__PRIVATE_NETWORKS": '["127.0.0.0/8"]',
        "MIM_IMAGES__ALLOWED_PORTS": "[]",
        "MIM_INDEX__RETRY_INITIAL_SECONDS": "2",
        "MIM_INDEX__RETRY_FACTOR": "1",
        "MIM_INDEX__RETRY_MAX_ATTEMPTS": "60",
    }
    worker = start_index(process, **env)
    async with feeding(settings) as feed, center(settings) as index:
        await feed.publish("titled", "a title first", image_url=pictures.url + "one")
        await feed.publish("bare", "", image_url=pictures.url + "one")
        await feed.publish("gone", "", image_url=pictures.url + "one")
        await feed.publish("titled-gone", "a title", image_url=pictures.url + "one")
        await feed.publish("newer", "", image_url=pictures.url + "one")
        await until(lambda: held(index, feed.ever), lambda rows: set(rows) == {"titled", "titled-gone"})
        assert not (await index.fetch(["titled"]))["titled"].has_image
        await until(lambda: read_all(settings, "items-retry"), lambda retries: len(retries) > 5)
        worker.kill()
        await feed.delete("gone")
        await feed.delete("titled-gone")
        await feed.publish("newer", "now with a title")
        pictures.there["one"] = picture("blue")
        start_index(process, **env)
        await until(
            lambda: held(index, {"titled", "bare"}),
            lambda rows: len(rows) == 2 and all(row.has_image for row in rows.values()),
        )
        await asyncio.sleep(5)  # time for every retry that is still about
        await assert_ends_with_the_last_word(feed, index)
        rows = await held(index, feed.ever)
        assert (rows["titled"].has_title, rows["bare"].has_title, rows["newer"].has_image) == (True, False, False)
    last = await announced(settings)
    assert {item_id for item_id, message in last.items() if message is not None} == {"titled", "bare", "newer"}
    assert (titled := last["titled"]) is not None and titled.has_image
