"""The report of a simulated run, and its scores on disk for comparisons with other runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from schemas.errors import Misconfigured
from streams.simulation.figures import figures_of, spans_of
from streams.simulation.run import SERVED, SimulatedRun
from trainer.datasets.spans import BehaviourLog
from trainer.metrics import ScoredRows, prequential_report

_SCORES, _REPORT = "scores.npz", "report.json"
_SHOWN = ("auc", "gauc", "list_gauc", "logloss")


def document_of(
    run: SimulatedRun, log: BehaviourLog, *, other: tuple[str, Mapping[str, NDArray[np.float64]]] | None, seed: int
) -> dict[str, Any]:
    """The report, ready for JSON. `prequential` is the demo's. `other` are the rows' digest and scores of another run.

    Raises `Misconfigured` if that run scored other rows.
    """
    rows = run.scored
    if other is not None and other[0] != digest_of(rows):
        raise Misconfigured(
            "--against: that run scored other rows; use the same folder, seed, and settings of the join"
        )
    learned = {name: values for name, values in rows.scores.items() if name != SERVED}
    plain = ScoredRows(**{**vars(rows), "scores": learned})
    return {
        "data": log.data.name,
        "seed": seed,
        "training_rows_sha256": run.rows_sha256,
        "rows_trained": run.rows,
        "steps": run.steps,
        "accounts": asdict(run.counts),
        "releases": [one.model_dump(mode="json") for one in run.decisions],
        "prequential": prequential_report(plain),
        "kinds": dict(run.kinds),
        **figures_of(run, spans_of(run, log), other=None if other is None else other[1], seed=seed),
    }


def digest_of(rows: ScoredRows) -> str:
    """Names the rows that were scored."""
    digest = hashlib.sha256(np.ascontiguousarray(rows.occurred_at).tobytes())
    digest.update(rows.label.tobytes())
    digest.update("\n".join([*rows.user.tolist(), *rows.item.tolist()]).encode())
    return digest.hexdigest()


def write_run(run: SimulatedRun, document: Mapping[str, Any], out: Path) -> None:
    """Write report and scores to a folder. Raises `Misconfigured` if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {f"score_{name}": values for name, values in run.scored.scores.items()}
        np.savez(out / _SCORES, **arrays, digest=digest_of(run.scored))
        (out / _REPORT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise Misconfigured(f"the report cannot be written to {out} (--out): {error.strerror}") from None


def read_run(folder: Path) -> tuple[str, dict[str, NDArray[np.float64]]]:
    """Digest of the rows, and scores by model, of `write_run`. Raises `Misconfigured` if there are none."""
    try:
        with (folder / _SCORES).open("rb") as file, np.load(file) as stored:
            scores = {name.removeprefix("score_"): stored[name] for name in stored.files if name != "digest"}
            return str(stored["digest"]), scores
    except (OSError, EOFError, BadZipFile, ValueError, KeyError) as error:
        raise Misconfigured(f"--against {folder} holds no scores of --protocol live: {error}") from None


def text_of(document: Mapping[str, Any]) -> str:
    """The report as Markdown tables."""
    lines = [
        f"# {document['data']}: live",
        "",
        f"- {document['rows_trained']:,} rows in {document['steps']:,} steps, {document['wall_seconds']:g} s; rows "
        f"sha256 {document['training_rows_sha256']}",
        f"- {sum(one['passed'] for one in document['releases'])} of {len(document['releases'])} candidates became "
        f"current; `{SERVED}` is what the release in force said of each row",
    ]
    if document["kinds"]:
        told = (f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in document["kinds"].items())
        lines += ["", f"Kinds of takes, the model that learns, newest rows: {', '.join(told)}"]
    buckets = list(next(iter(document["figures"].values())))
    for bucket in buckets:
        of = {name: found[bucket] for name, found in document["figures"].items() if found[bucket] is not None}
        if not of:
            continue
        first = next(iter(of.values()))
        lines += ["", f"## {bucket}: {first['impressions']:,} impressions, {first['users']:,} users", ""]
        lines += ["| model | AUC | GAUC | in lists | log-loss | GAUC of the reference minus it |", "|" + " --- |" * 6]
        gains = {pair.partition("-")[2]: found[bucket] for pair, found in document["paired"].items()}
        for name, found in of.items():
            gain = gains.get(name)
            cells = [name, *(f"{found[figure]:.4f}" for figure in _SHOWN)]
            cells.append("" if gain is None else f"{gain['difference']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
