"""`mimstream dead-letters list|show|requeue|drop`."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from schemas.errors import Misconfigured, Reason
from schemas.letters import DeadLetter
from streams.broker.clients import broker_errors, make_producer
from streams.broker.cluster import describe_topics
from streams.broker.log_reader import LogReader
from streams.dead_letters.inbox import DeadLetterEntry, DeadLetterTopic, Filter, only_open
from streams.dead_letters.requeue import Requeue, RequeueResult
from streams.dead_letters.survey import Kind, KindSummary, Survey
from streams.runtime.progress import progress_bar
from streams.runtime.terminal import escaped, print_table, say
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
    parser.add_argument(
        "--limit", type=int, default=100, metavar="N", help="list at most this many, the last to fail (default: 100)"
    )
    parser.add_argument(
        "--summary", action="store_true", help="list numbers and times by topic, stage and reason, and no letters"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Run the action. Status 1 if it could not be done for all letters named."""
    wanted = _filter(options, datetime.now(UTC))
    if options.action in ("requeue", "drop") and wanted == Filter() and not options.all:
        raise Misconfigured(f"name letters to {options.action}: by ID, by filters, or --all")
    if options.action == "show" and not options.ids:
        raise Misconfigured("name the letters to show: their IDs are in 'mimstream dead-letters list'")
    if options.limit < 1:
        raise Misconfigured(f"--limit {options.limit}: list at least one letter, or none with --summary")
    return asyncio.run(_run(options, settings, wanted))


async def _run(options: argparse.Namespace, settings: Settings, wanted: Filter) -> int:
    async with _opened(settings) as (dead_letters, requeue):
        if options.action == "list":
            missing = await _list(options, dead_letters, wanted)
            return _tell_missing(missing)
        with progress_bar("reading letters") as bar:
            entries = [entry for entry in await dead_letters.read(bar.set) if wanted.admits(entry.newest)]
        missing = sorted(wanted.ids - {entry.id for entry in entries})
        if options.action == "show":
            letters = [(entry, await dead_letters.letter(entry)) for entry in entries]
            _show(letters, as_json=options.json)
        else:
            chosen = entries if options.ids else only_open(entries)
            results = [RequeueResult(name, "refused", "there is no such letter") for name in missing]
            if options.action == "drop":
                results += await _drop(dead_letters, chosen)
            else:
                results += await _requeue(requeue, chosen)
            _print_results(results, as_json=options.json)
            return 1 if any(result.status in ("refused", "superseded") for result in results) else 0
    return _tell_missing(missing)


def _tell_missing(missing: Sequence[str]) -> int:
    for name in missing:
        say(f"mimstream: there is no letter {name}", error=True)
    return 1 if missing else 0


async def _list(options: argparse.Namespace, dead_letters: DeadLetterTopic, wanted: Filter) -> list[str]:
    """List letters, or a summary of them; returns the ids that were named and are not there."""
    survey = Survey(wanted, with_handled=options.all or bool(options.ids))
    with progress_bar("reading letters") as bar:
        await dead_letters.survey(survey, bar.set)
    kinds = survey.kinds()
    if options.summary:
        _print_summary(kinds, as_json=options.json)
        return []
    entries = await dead_letters.newest(survey, max(options.limit, len(options.ids)))
    _print_list(entries, as_json=options.json)
    if (count := survey.count()) > len(entries):
        if not options.json:
            _print_summary(kinds, as_json=False)
        say(f"mimstream: these are the last {len(entries)} of {count}; --limit gives more", error=True)
    return sorted(wanted.ids - {entry.id for entry in entries})


def _print_summary(kinds: Mapping[Kind, KindSummary], *, as_json: bool) -> None:
    rows = [
        {"topic": topic, "stage": stage, "reason": reason}
        | {"open": one.open, "handled": one.handled}
        | {"first_failed_at": _iso(one.first_failed_at), "last_failed_at": _iso(one.last_failed_at)}
        for (topic, stage, reason), one in kinds.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    heads = ("topic", "stage", "reason", "open", "handled", "first failure", "last failure")
    print_table(heads, [tuple(str(value)[:19] for value in row.values()) for row in rows])


def _iso(moment: datetime | None) -> str:
    return "" if moment is None else moment.isoformat()


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[tuple[DeadLetterTopic, Requeue]]:
    await asyncio.to_thread(describe_topics, settings.kafka, settings.topics, ["dead-letters"])
    async with LogReader(settings.kafka, settings.topics) as reader:
        producer = make_producer(settings.kafka, linger_ms=0)
        with broker_errors(settings.kafka):
            await producer.start()
        try:
            dead_letters = DeadLetterTopic(reader, producer, settings.kafka, now=lambda: datetime.now(UTC))
            yield dead_letters, Requeue(reader, producer, settings.kafka, dead_letters)
        finally:
            await producer.stop()


async def _requeue(requeue: Requeue, chosen: Sequence[DeadLetterEntry]) -> list[RequeueResult]:
    with progress_bar("sending again", len(chosen)) as bar:
        return await requeue.requeue(chosen, lambda _: bar.advance())


async def _drop(dead_letters: DeadLetterTopic, chosen: Sequence[DeadLetterEntry]) -> list[RequeueResult]:
    await dead_letters.mark(only_open(chosen), "dropped")
    return [
        RequeueResult(entry.id, "already_requeued" if entry.handled == "requeued" else "dropped") for entry in chosen
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


def _row(entry: DeadLetterEntry) -> dict[str, Any]:
    letter = entry.newest
    return {
        "id": entry.id,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "key": None if letter.key is None else letter.key.decode(errors="backslashreplace"),
        "stage": letter.stage,
        "reason": letter.reason.value,
        "detail": letter.detail,
        "attempts": entry.attempts,
        "first_failed_at": entry.first_failed_at.isoformat(),
        "last_failed_at": letter.failed_at.isoformat(),
        "requeued_from": letter.requeued_from,
        "letters": entry.letters,
        "value_bytes": entry.value_bytes,
        "handled": entry.handled,
    }


def _print_list(entries: Sequence[DeadLetterEntry], *, as_json: bool) -> None:
    rows = [_row(entry) for entry in entries]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    heads = ("id", "key", "stage", "reason", "attempts", "first failure", "last failure", "handled", "detail")
    cells = [
        (
            row["id"],
            row["key"],
            row["stage"],
            row["reason"],
            str(row["attempts"]),
            row["first_failed_at"][:19],
            row["last_failed_at"][:19],
            row["handled"],
            row["detail"][:80],
        )
        for row in rows
    ]
    print_table(heads, cells)


def _show(letters: Sequence[tuple[DeadLetterEntry, DeadLetter]], *, as_json: bool) -> None:
    if as_json:
        shown = [
            _row(entry)
            | {"value_base64": None if letter.value is None else base64.b64encode(letter.value).decode("ascii")}
            for entry, letter in letters
        ]
        print(json.dumps(shown, indent=2))
        return
    for entry, letter in letters:
        for name, value in _row(entry).items():
            print(f"{name:<16} {escaped(str(value))}")
        text = "" if letter.value is None else letter.value.decode(errors="backslashreplace")
        say(text[:_SHOWN_CHARACTERS] + (" ..." if len(text) > _SHOWN_CHARACTERS else "") + "\n")


def _print_results(results: Sequence[RequeueResult], *, as_json: bool) -> None:
    counts = Counter(result.status for result in results)
    if as_json:
        letters = [{"id": one.id, "became": one.status, "detail": one.detail} for one in results]
        print(json.dumps({"counts": counts, "letters": letters}, indent=2))
        return
    print_table(("id", "became", "detail"), [(one.id, one.status.replace("_", " "), one.detail) for one in results])
    print(", ".join(f"{number} {what.replace('_', ' ')}" for what, number in counts.items()) or "nothing to do")
