"""Ids, keys and messages of any origin reach a terminal as text: no markup, no escape sequences."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from schemas.errors import PipelineError, Reason
from schemas.letters import DeadLetter
from schemas.manifests import PromotionDecision
from streams import cli
from streams.broker.topics import TopicsConfig
from streams.center.compare import CenterReport, Finding
from streams.commands import center, check, dead_letters, models, stack, topics
from streams.dead_letters.inbox import DeadLetterIndex
from streams.dead_letters.requeue import RequeueResult
from streams.demo.report import print_report
from streams.settings import Settings
from streams.stack.supervisor import PartReport
from streams.stores.artifacts.registry import in_memory_registry
from streams.wiring.preflight import CheckLine
from tests.factories.demo import make_result
from tests.factories.releases import make_manifest, make_weights

CLIPBOARD, TITLE, CSI = "\x1b]52;c;ZXZpbA==\x07", "\x1b]0;x\x1b\\", "\x9b31m"
HOSTILE = f"[/x][bold]a[link=x]{CLIPBOARD}{TITLE}{CSI}\u202e\u2028\r"
ACTING = set("\x1b\x07\x9b\u202e\u2028\r")
NOW = datetime(2026, 5, 1, tzinfo=UTC)
LETTER = DeadLetter("items", 0, 1, HOSTILE.encode(), HOSTILE.encode(), HOSTILE, Reason.NOT_JSON, HOSTILE, NOW)


def entry() -> Any:
    index = DeadLetterIndex()
    index.add(key=LETTER.letter_key, value=LETTER.value, headers=LETTER.headers(), at=(0, 0))
    return index.entries()[0]


def list_releases() -> None:
    store = in_memory_registry()
    manifest = make_manifest(1)
    store.publish(make_weights(1), manifest)
    store.record_decision(manifest.release_id, PromotionDecision(passed=False, reasons=[HOSTILE]))
    models._show_list(store, as_json=False)


def list_faults() -> None:
    report = CenterReport()
    report.add(Finding("stale", HOSTILE, 0, 1, HOSTILE))
    center._print(report, as_json=False)


def list_topics() -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = SimpleNamespace(partitions={}, hidden=set(), replicas={})
        patch.setattr(topics, "describe_topics", lambda *_, **__: found)
        named = SimpleNamespace(**TopicsConfig().model_dump(), full_name=lambda _: HOSTILE)
        settings = Settings().model_copy(update={"topics": named})
        topics.run(argparse.Namespace(action="list", json=False), settings)


def list_stack() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "status", lambda *_: [PartReport(HOSTILE, False, HOSTILE, 1, 0, None, HOSTILE, HOSTILE)])
        stack.run(
            argparse.Namespace(action="status", name=HOSTILE.replace("/", ""), purge=False, json=False), Settings()
        )


def print_demo() -> None:
    result = make_result(data=HOSTILE)
    print_report(result, Path(HOSTILE), Console(width=2_000))


LISTINGS: dict[str, Callable[[], object]] = {
    "dead-letters list": lambda: dead_letters._print_list([entry()], as_json=False),
    "dead-letters show": lambda: dead_letters._show([(entry(), LETTER)], as_json=False),
    "dead-letters requeue": lambda: dead_letters._print_results(
        [RequeueResult(HOSTILE, "refused", HOSTILE)], as_json=False
    ),
    "check": lambda: check._show([CheckLine(HOSTILE, "failed", HOSTILE, HOSTILE)]),
    "models list": list_releases,
    "center verify": list_faults,
    "topics list": list_topics,
    "stack status": list_stack,
    "demo": print_demo,
    "an error": lambda: cli._fail(PipelineError(HOSTILE), 1),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_shows_hostile_text_as_it_is(name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    LISTINGS[name]()
    out, err = capsys.readouterr()
    assert not ACTING & set(out + err)
    assert re.search(r"\[/?x\]\[bold\]a\[link=x\]\\x1b\]52;c;", out + err)
