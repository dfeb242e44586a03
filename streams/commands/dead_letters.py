"""`mimstream dead-letters list|show|requeue|drop`."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from schemas.errors import Misconfigured, Reason
from schemas.letters import DeadLetter
from streams.broker.clients import broker_errors, make_producer
from streams.broker.log_reader import LogReader
from streams.dead_letters.inbox import DeadLetterEntry, DeadLetterTopic, Filter, only_open
from streams.dead_letters.requeue import Requeue, RequeueResult
from streams.runtime.progress import progress_bar
from streams.settings import Settings

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}
_SHOWN_CHARACTERS = 4_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=["list", "show", "requeue", "drop"])
    parser.add_argument("ids", nargs="*", metavar="ID", help="topic/partition/offset of the record that failed")
    parser.add_argument("--topic", choices=["items", "items-retry", "behaviours"], help="only records of this topic")
    parser.add_argument("--stage", help="only what failed in this step (decode, image, encode, write, record)")
    parser.add_argument("--reason", choices=[reason.value for reason in Reason], metavar="REASON", help="only this one")
    parser.add_argument("--since", help="only what failed since: ISO time with a zone, or 30m, 2h, 7d")
    parser.add_argument("--key", help="only records of this key")
    parser.add_argument("--all", action="store_true", help="list handled ones too; requeue or drop all that are open")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Do it. Status 1 if something that was asked for could not be done."""
    wanted = _filter(options, datetime.now(UTC))
    if options.action in ("requeue", "drop") and wanted == Filter() and not options.all:
        raise Misconfigured(f"name letters to {options.action}: by ID, by filters, or --all")
    if options.action == "show" and not options.ids:
        raise Misconfigured("name the letters to show: their IDs are in 'mimstream dead-letters list'")
    return asyncio.run(_run(options, settings, wanted))


async def _run(options: argparse.Namespace, settings: Settings, wanted: Filter) -> int:
    async with _opened(settings) as (box, sending):
        with progress_bar("reading letters") as bar:
            everything = [filed for filed in await box.read(bar.set) if wanted.admits(filed)]
        missing = sorted(wanted.ids - {filed.id for filed in everything})
        if options.action == "list":
            _list(everything if options.all or options.ids else only_open(everything), as_json=options.json)
        elif options.action == "show":
            letters = [(filed, await box.letter(filed)) for filed in everything]
            _show(letters, as_json=options.json)
        else:
            chosen = everything if options.ids else only_open(everything)
            outcomes = [RequeueResult(name, "refused", "there is no such letter") for name in missing]
            if options.action == "drop":
                outcomes += await _drop(box, chosen)
            else:
                outcomes += await _requeue(sending, chosen)
            _tell(outcomes, as_json=options.json)
            return 1 if any(outcome.became in ("refused", "superseded") for outcome in outcomes) else 0
    for name in missing:
        print(f"mimstream: there is no letter {name}", file=sys.stderr)
    return 1 if missing else 0


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[tuple[DeadLetterTopic, Requeue]]:
    async with LogReader(settings.kafka, settings.topics) as reader:
        producer = make_producer(settings.kafka, linger_ms=0)
        with broker_errors(settings.kafka):
            await producer.start()
        try:
            box = DeadLetterTopic(reader, producer, settings.kafka, now=lambda: datetime.now(UTC))
            yield box, Requeue(reader, producer, settings.kafka, box)
        finally:
            await producer.stop()


async def _requeue(sending: Requeue, chosen: Sequence[DeadLetterEntry]) -> list[RequeueResult]:
    with progress_bar("sending again", len(chosen)) as bar:
        return await sending.requeue(chosen, lambda _: bar.advance())


async def _drop(box: DeadLetterTopic, chosen: Sequence[DeadLetterEntry]) -> list[RequeueResult]:
    await box.mark(only_open(chosen), "dropped")
    return [
        RequeueResult(filed.id, "already_requeued" if filed.handled == "requeued" else "dropped") for filed in chosen
    ]


def _filter(options: argparse.Namespace, now: datetime) -> Filter:
    return Filter(
        ids=frozenset(options.ids),
        topic=options.topic,
        stage=options.stage,
        reason=Reason(options.reason) if options.reason else None,
        since=_moment(options.since, now) if options.since else None,
        key=options.key.encode() if options.key is not None else None,
    )


def _moment(text: str, now: datetime) -> datetime:
    if match := re.fullmatch(r"(\d{1,6})([mhd])", text):
        return now - timedelta(**{_UNITS[match[2]]: int(match[1])})
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise Misconfigured(f"--since {text!r}: give a time with a zone (2026-09-16T00:00Z), or 30m, 2h, 7d")
    return moment


def _row(filed: DeadLetterEntry) -> dict[str, Any]:
    letter = filed.newest
    return {
        "id": filed.id,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "key": None if letter.key is None else letter.key.decode(errors="backslashreplace"),
        "stage": letter.stage,
        "reason": letter.reason.value,
        "detail": letter.detail,
        "attempts": filed.attempts,
        "first_failed_at": filed.first_failed_at.isoformat(),
        "last_failed_at": letter.failed_at.isoformat(),
        "requeued_from": letter.requeued_from,
        "letters": filed.letters,
        "value_bytes": filed.value_bytes,
        "handled": filed.handled,
    }


def _list(letters: Sequence[DeadLetterEntry], *, as_json: bool) -> None:
    rows = [_row(filed) for filed in letters]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("id", "key", "stage", "reason", "attempts", "first failure", "last failure", "handled", "detail")
    for row in rows:
        table.add_row(
            row["id"],
            row["key"],
            row["stage"],
            row["reason"],
            str(row["attempts"]),
            row["first_failed_at"][:19],
            row["last_failed_at"][:19],
            row["handled"] or "",
            row["detail"][:80],
        )
    Console().print(table)


def _show(letters: Sequence[tuple[DeadLetterEntry, DeadLetter]], *, as_json: bool) -> None:
    if as_json:
        shown = [
            _row(filed)
            | {"value_base64": None if letter.value is None else base64.b64encode(letter.value).decode("ascii")}
            for filed, letter in letters
        ]
        print(json.dumps(shown, indent=2))
        return
    for filed, letter in letters:
        for name, value in _row(filed).items():
            print(f"{name:<16} {value}")
        text = "" if letter.value is None else letter.value.decode(errors="backslashreplace")
        print(text[:_SHOWN_CHARACTERS] + (" ..." if len(text) > _SHOWN_CHARACTERS else ""), end="\n\n")


def _tell(outcomes: Sequence[RequeueResult], *, as_json: bool) -> None:
    counts = Counter(outcome.became for outcome in outcomes)
    if as_json:
        letters = [{"id": one.id, "became": one.became, "detail": one.detail} for one in outcomes]
        print(json.dumps({"counts": counts, "letters": letters}, indent=2))
        return
    table = Table("id", "became", "detail")
    for one in outcomes:
        table.add_row(one.id, one.became.replace("_", " "), one.detail)
    Console().print(table)
    print(", ".join(f"{number} {what.replace('_', ' ')}" for what, number in counts.items()) or "nothing to do")
