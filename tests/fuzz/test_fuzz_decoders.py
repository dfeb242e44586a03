"""The decoders of untrusted bytes raise expected errors at worst, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.fuzz import CORPUS, HERE, mutated, seeds
from tests.fuzz.targets import TARGETS

CORPUS_FILES = [(path.parent.name, path.name) for path in sorted(CORPUS.glob("*/*"))]
SPARE = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FIELDS = [
    *("item_id", "title", "text", "category", "price", "year", "image", "image_url", "published_at", "updated_at"),
    *("event", "event_id", "user_id", "kind", "occurred_at", "schema_version", "query", "trigger_item", "session_id"),
    *("encoder_version", "vector", "dim", "content_hash", "source", "partition", "offset", "item", "attempt"),
    *("not_before", "item_ids", "k", "include_self", "sku", "pics", "names", "en", "href", "id", "user", "ts", "name"),
    *("lines", "value", "body", "x", "payload", "ends", "forgotten_at", "cluster_id", "topic_id"),
    *("features", "state", "head", "served", "outcome", "number", "before", "left", "held", "targets", "history"),
    *("history_seconds", "values", "probabilities", "rows", "differing", "tolerance", "largest", "compared_at", "now"),
]
GOOD = ["a", "click", "2026-01-01T00:00:00Z", "iVBORw0KGgo=", "http://x.test/a.png", 1, 1.5, True, None, 1_760_000_000]
leaf = (
    st.sampled_from(GOOD)
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.datetimes(timezones=st.timezones()).map(lambda time: time.isoformat())
)
document: st.SearchStrategy[Any] = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=8)
)
DOCUMENTS = sorted(name for name, target in TARGETS.items() if not target.binary and name != "bundle-sums")


def test_every_target_has_a_corpus_and_every_corpus_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.parametrize(("name", "file"), CORPUS_FILES)
def test_what_was_found_once_breaks_nothing_now(name: str, file: str) -> None:
    TARGETS[name].feed((CORPUS / name / file).read_bytes())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_any_document_is_read_or_refused(name: str) -> None:
    target = TARGETS[name]

    @SPARE
    @given(st.dictionaries(st.sampled_from(FIELDS), document, min_size=1, max_size=14))
    def check(fields: dict[str, Any]) -> None:
        target.feed(json.dumps(fields).encode())

    check()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_changed_samples_and_any_bytes_are_read_or_refused(name: str) -> None:
    target, known = TARGETS[name], seeds(name)

    @SPARE
    @given(st.sampled_from(known), st.randoms(use_true_random=False), st.binary(max_size=64))
    def check(sample: bytes, draw: Any, anything: bytes) -> None:
        target.feed(mutated(sample, known, draw))
        target.feed(anything)

    check()


def test_the_fuzzer_runs_a_target_in_bounded_memory() -> None:
    chosen = ["pictures"]
    command = [sys.executable, str(HERE / "fuzz.py"), *chosen, "--runs", "60", "--seed", "7"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing broke" in done.stdout
    assert done.stdout.count(": 60 inputs") == len(chosen)
