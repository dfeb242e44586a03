"""`mimstream models list|show|promote|rollback|pin|unpin`: releases, the current one, and the history of changes.

The pointer in the model registry decides: servers poll it every `MIM_SERVE__POLL_MODELS_SECONDS`. A notice on the topic
`models` makes them read it at once; the command also works without a broker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from schemas.errors import PipelineError
from schemas.manifests import ModelManifest, PromotionDecision, ReleaseNotice
from streams.broker.clients import broker_errors, make_producer
from streams.broker.cluster import describe_topics
from streams.runtime.terminal import print_table
from streams.settings import Settings
from streams.stores.artifacts.promotion import CurrentPointer
from streams.stores.artifacts.registry import ModelRegistry, current_user, find_release, open_registry

log = structlog.get_logger()

FIGURES = ("ciubm_gauc", "ciubm_logloss", "ciubm_calibration")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    about = {
        "list": "all releases that are kept, what state they are in and how well they did",
        "show": "one release: manifest, verdict of the promotion gate, every change that made it current",
        "promote": "make a release current, also one that the gate refused or an older one; pins stay as they are",
        "rollback": "make the parent of the current release current, and pin it: a running trainer would undo it",
        "pin": "keep trainers from changing the current release; they still train and keep candidates",
        "unpin": "let the next release that passes the gate become current again",
    }
    for action, text in about.items():
        sub = actions.add_parser(action, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print JSON")
        if action in ("show", "promote"):
            optional = {"nargs": "?"} if action == "show" else {}
            sub.add_argument("release", help="release, or the head of its name (r000007)", **optional)  # type: ignore[arg-type]
        if action == "rollback":
            sub.add_argument("--to", dest="release", metavar="RELEASE", help="this release instead of the parent")
        if action not in ("list", "show"):
            sub.add_argument("--why", help="reason, kept in the history")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Show releases, or move the pointer."""
    store = open_registry(settings.models)
    if options.action == "list":
        _show_list(store, as_json=options.json)
    elif options.action == "show":
        print(json.dumps(describe_release(store, find_release(store, options.release)), indent=2))
    else:
        _change(options, settings, store)
    return 0


def list_releases(store: ModelRegistry, *, now: datetime) -> list[dict[str, Any]]:
    """One row per kept release, oldest first."""
    current, been_current = store.current(), store.been_current()
    rows = []
    for manifest in store.list():
        decision = store.decision(manifest.release_id)
        figures = manifest.metrics | (decision.figures if decision else {})
        rows.append(
            {
                "release_id": manifest.release_id,
                "state": _state(manifest, current, been_current, refused=decision is not None and not decision.passed),
                "pinned": current is not None and current.pinned and current.release_id == manifest.release_id,
                "parent": manifest.parent,
                "created_at": manifest.created_at.isoformat(),
                "age_seconds": round((now - manifest.created_at).total_seconds()),
                "rows_trained": manifest.rows_trained,
                "last_event_at": manifest.last_event_at and manifest.last_event_at.isoformat(),
                "encoder_version": manifest.encoder_version,
                "metrics": figures,
                "reasons": decision.reasons if decision else [],
                "compared": None if decision is None else _compared(decision),
            }
        )
    return rows


def _compared(decision: PromotionDecision) -> str:
    """With which release, on how many rows, and what was not compared and why."""
    told = [] if decision.against is None else [f"{_number(decision.against)}, {decision.rows} rows"]
    if decision.best is not None:
        told.append(f"best so far {_number(decision.best)}")
    return "; ".join([*told, *decision.remarks])


def _number(release_id: str) -> str:
    return release_id.partition("-")[0]


def _state(manifest: ModelManifest, current: CurrentPointer | None, been_current: set[str], *, refused: bool) -> str:
    if current is not None and manifest.release_id == current.release_id:
        return "current"
    if current is not None and manifest.release_id in current.doomed:
        return "being removed"
    if manifest.release_id in been_current:
        return "superseded"
    return "refused" if refused else "candidate"


def describe_release(store: ModelRegistry, manifest: ModelManifest) -> dict[str, Any]:
    """Manifest, promotion decision and history of one release."""
    decision = store.decision(manifest.release_id)
    return {
        "manifest": manifest.model_dump(mode="json"),
        "verdict": None if decision is None else decision.model_dump(mode="json"),
        "history": [
            pointer.model_dump(mode="json", include={"sequence", "action", "pinned", "by", "at", "why"})
            for pointer in store.history()
            if pointer.release_id == manifest.release_id
        ],
    }


def _change(options: argparse.Namespace, settings: Settings, store: ModelRegistry) -> None:
    store.check()
    seen = store.current()
    if options.action in ("pin", "unpin"):
        changed = store.pin(options.action == "pin", why=options.why)
        said = f"{options.action}ned" if changed else f"was {options.action}ned already"
    else:
        manifest = _wanted(options, store, seen)
        store.choose(manifest.release_id, seen=seen, rollback=options.action == "rollback", why=options.why)
        changed, said = True, "answers now"
    after = store.current()
    assert after is not None
    announced = changed and asyncio.run(_announce(settings, store.manifest(after.release_id)))
    if options.json:
        print(json.dumps({**after.model_dump(mode="json"), "changed": changed, "announced": announced}, indent=2))
        return
    print(f"{after.release_id} {said}" + (" and is pinned" if after.pinned and options.action == "rollback" else ""))
    if changed and not announced:
        print(f"no broker answers: servers look within {settings.serve.poll_models_seconds:g} s by themselves")


def _wanted(options: argparse.Namespace, store: ModelRegistry, seen: CurrentPointer | None) -> ModelManifest:
    named = options.release
    if named is None:
        current = find_release(store, None)
        if current.parent is None:
            raise PipelineError(f"{current.release_id} has no parent to go back to")
        named = current.parent
    wanted = find_release(store, named)
    if seen is not None:
        serving = store.manifest(seen.release_id)
        if serving.encoder_version != wanted.encoder_version:
            raise PipelineError(
                f"{wanted.release_id} goes with vectors of encoder {wanted.encoder_version}, what answers now with "
                f"{serving.encoder_version}: servers would refuse it"
            )
    return wanted


async def _announce(settings: Settings, manifest: ModelManifest) -> bool:
    """Send a notice if a broker answers; without it servers notice the change at their next poll."""
    notice = ReleaseNotice(
        release_id=manifest.release_id,
        weights_sha256=manifest.weights_sha256,
        encoder_version=manifest.encoder_version,
        released_at=manifest.created_at,
        chosen_by=current_user(),
    )
    producer = make_producer(settings.kafka)
    try:
        with broker_errors(settings.kafka):
            await producer.start()
            await asyncio.to_thread(describe_topics, settings.kafka, settings.topics, ["models"])
            await producer.send_and_wait(
                settings.topics.full_name("models"), notice.model_dump_json().encode(), key=manifest.release_id.encode()
            )
    except PipelineError as error:
        log.warning("models.not_announced", error=str(error))
        return False
    finally:
        await producer.stop()
    return True


def _show_list(store: ModelRegistry, *, as_json: bool) -> None:
    rows = list_releases(store, now=datetime.now(UTC))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    heads = ("release", "state", "age", "rows", "last event", *FIGURES, "compared with", "refused because")
    cells = [
        (
            row["release_id"],
            row["state"] + (", pinned" if row["pinned"] else ""),
            _age(row["age_seconds"]),
            str(row["rows_trained"]),
            str(row["last_event_at"] or "-"),
            *_figures(row["metrics"]),
            row["compared"] or "-",
            "; ".join(row["reasons"]),
        )
        for row in rows
    ]
    print_table(heads, cells)


def _figures(metrics: dict[str, float | None]) -> Sequence[str]:
    return ["-" if (value := metrics.get(name)) is None else f"{value:.4f}" for name in FIGURES]


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
