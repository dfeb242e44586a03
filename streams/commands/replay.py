"""`mimstream replay DIR`: publish a data-set folder through Kafka in event-time order."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

from schemas.errors import Misconfigured
from streams.broker.clients import broker_errors, make_producer
from streams.broker.cluster import describe_topics
from streams.broker.lag import GroupPositions
from streams.broker.topics import TopicName
from streams.commands.arguments import ROLES, positive, roles, share
from streams.replay.sender import Replay, Sent
from streams.replay.timeline import Timeline
from streams.runtime.progress import progress_bars
from streams.settings import Settings
from trainer.datasets.exposures import Behaviours, behaviours_of
from trainer.datasets.folder import DataSet, open_data_set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_shared_arguments(parser)
    parser.add_argument("--events", type=positive, metavar="N", help="keep at most N takes, sampling users whole")
    parser.add_argument("--neg-type", default="pop", help="which sampled negatives to show (default: pop)")
    parser.add_argument(
        "--speed", type=float, metavar="N", help="N seconds of event time per second (default: no limit)"
    )


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `replay` and `import`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="data-set folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (default: 0)")
    parser.add_argument("--broken", type=share, default=0.0, metavar="SHARE", help="share of broken events to mix in")
    parser.add_argument(
        "--follow",
        type=roles,
        default=[],
        metavar="ROLES",
        help="pause while these consumer groups are behind: index, record, train, separated by commas",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Replay the folder and print what was sent."""
    if options.speed is not None and options.speed <= 0:
        raise Misconfigured(f"--speed is {options.speed:g}, it must be above 0")
    data = open_data_set(options.folder, neg_type=options.neg_type)
    return publish(
        options,
        settings,
        data,
        behaviours_of(data, seed=options.seed, events=options.events, retakes=True),
        options.speed,
    )


def publish(
    options: argparse.Namespace,
    settings: Settings,
    data: DataSet,
    behaviours: Behaviours | None,
    speed: float | None = None,
) -> int:
    """Send the set and print what was sent."""
    timeline = Timeline(data, behaviours, options.seed, datetime.now(UTC), options.broken)
    timeline.refuse_field_maps(settings.index.field_map, settings.record.field_map)
    started = time.monotonic()
    sent = asyncio.run(send(timeline, settings, options.follow, speed))
    summary = {
        "data": data.name,
        "items_published": sent.items,
        "behaviours_sent": sent.behaviours,
        "broken": len(sent.broken),
        "pictures_left_out": len(sent.without_picture),
        "query_images_left_out": sent.without_query_image,
        "records_left_out": sent.records_left_out,
        "rows_without_user": data.without_user,
        "exposures_drawn": behaviours.drawn_from if behaviours is not None else None,
        "wall_seconds": round(time.monotonic() - started, 3),
    }
    if options.json:
        print(json.dumps(summary))
    else:
        print(
            f"{data.name}: {sent.items:,} items and {sent.behaviours:,} behaviours sent in "
            f"{summary['wall_seconds']:.1f} s, {len(sent.broken):,} of them broken on purpose"
        )
        if sent.without_picture or sent.without_query_image or sent.records_left_out:
            print(
                f"too large for MIM_KAFKA__MAX_RECORD_BYTES: {len(sent.without_picture):,} pictures, whose items were "
                f"sent without them, {sent.without_query_image:,} photos of searches likewise, and "
                f"{sent.records_left_out:,} records, which were not sent"
            )
        if data.left_out is not None:
            print(f"of the folder, {data.left_out}")
        if summary["exposures_drawn"]:
            print(f"exposures that led to nothing were {summary['exposures_drawn']}")
    return 0


async def send(timeline: Timeline, settings: Settings, follow: Sequence[str], speed: float | None) -> Sent:
    """Send the timeline, with a progress bar on standard error."""
    followed: dict[TopicName, list[str]] = {}
    for role in follow:
        followed.setdefault(ROLES[role], []).append(role)
    needed: list[TopicName] = ["items", "behaviours"] if timeline.events else ["items"]
    # a producer would wait for a topic that is not there
    await asyncio.to_thread(describe_topics, settings.kafka, settings.topics, needed)
    async with AsyncExitStack() as stack:
        positions = None
        if followed:
            positions = await stack.enter_async_context(GroupPositions(settings.kafka, settings.topics, followed))
        producer = make_producer(settings.kafka)
        with broker_errors(settings.kafka):
            await producer.start()
        stack.push_async_callback(producer.stop)
        replay = Replay(producer, settings.kafka, settings.topics, settings.replay, positions=positions, speed=speed)
        display = asyncio.create_task(show_progress(timeline, replay.sent))
        stack.callback(display.cancel)
        return await replay.run(timeline)


async def show_progress(timeline: Timeline, sent: Sent) -> None:
    """Draw two bars until cancelled."""
    with progress_bars() as add_bar:
        items, behaviours = add_bar("items", timeline.items), add_bar("behaviours", timeline.events)
        while True:
            items.set(sent.items)
            behaviours.set(sent.behaviours)
            await asyncio.sleep(0.2)
