"""`mimstream forget user ID`."""

from __future__ import annotations

import argparse
import asyncio
import json
from datetime import UTC, datetime

from pydantic import TypeAdapter, ValidationError

from schemas.base import UserId
from schemas.errors import Misconfigured
from schemas.forgotten import ForgottenUser
from streams.broker.clients import broker_errors, make_producer
from streams.broker.cluster import describe_topics
from streams.broker.log_reader import read_ends
from streams.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("what", choices=["user"], help="what to forget")
    parser.add_argument("id", help="the user's id")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Write a request to forget a user; every process that reads `forgotten` applies it."""
    try:
        user_id = TypeAdapter(UserId).validate_python(options.id)
    except ValidationError as error:
        raise Misconfigured(f"{options.id!r} is no user id: {error.errors()[0]['msg']}") from None
    request = asyncio.run(forget_user(settings, user_id))
    if options.json:
        print(request.model_dump_json(indent=2))
        return 0
    print(
        f"{user_id}: every event that {settings.topics.full_name('behaviours')} holds now is erased for whoever reads "
        f"it from here on (offsets below {json.dumps(request.ends)}); events that come later are a new user's"
    )
    return 0


async def forget_user(settings: Settings, user_id: str) -> ForgottenUser:
    """Write the request; it counts once this returns. Raises `BrokerUnavailable`, `Misconfigured`."""
    found = await asyncio.to_thread(describe_topics, settings.kafka, settings.topics, ["behaviours", "forgotten"])
    identity = found.incarnation(settings.topics, "behaviours")
    request = ForgottenUser(
        user_id=user_id,
        forgotten_at=datetime.now(UTC),
        cluster_id=identity.cluster_id,
        topic_id=identity.topic_id,
        ends=await read_ends(settings.kafka, settings.topics, "behaviours"),
    )
    producer = make_producer(settings.kafka)
    try:
        with broker_errors(settings.kafka):
            await producer.start()
            await producer.send_and_wait(
                settings.topics.full_name("forgotten"), request.model_dump_json().encode(), key=user_id.encode()
            )
    finally:
        await producer.stop()
    return request
