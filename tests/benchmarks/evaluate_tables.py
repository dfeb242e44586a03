"""One page from the studies of `mimstream evaluate` on a folder: protocols, models, vectors, ablations.

    python -m tests.benchmarks.evaluate_tables DIR STUDIES --out tests/benchmarks/results/evaluate_NAME

STUDIES holds a folder for each study, named `<protocol>-<vectors>`, each written by
`mimstream evaluate DIR --protocol <protocol> --vectors <vectors> --out STUDIES/<protocol>-<vectors>`. Figures are those
of the studies' own reports; only what compares two studies is computed here, from their scores, user by user.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.evaluation.figures import REFERENCE
from streams.evaluation.report import statements
from tests.benchmarks.csft_tables import markdown_table
from trainer.datasets.folder import open_data_set
from trainer.datasets.spans import BehaviourLog
from trainer.metrics import UserAuc, auc, user_auc
from trainer.offline import registry
from trainer.offline.buckets import buckets
from trainer.offline.columns import read_columns
from trainer.offline.encoder_versions import VECTOR_KINDS
from trainer.offline.judging import Bootstrap, mean_over_seeds
from trainer.offline.protocols import PROTOCOLS, ProtocolName, protocol_of

BUCKETS = ("overall", "cold", "under_24h", "under_7d", "never_taken")


@dataclass(frozen=True, eq=False)
class Judged:
    """Who and what a protocol scores: rows of the test span, with the rows of each bucket."""

    user_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    buckets: dict[str, NDArray[np.bool_]]

    @staticmethod
    def of(folder: Path, name: ProtocolName) -> Judged:
        """The rows in the order in which `mimstream evaluate` scores them."""
        data = open_data_set(folder, neg_type="pop", attributes=("cold_holdout",))
        protocol = protocol_of(BehaviourLog.of(data, folder), name)
        recorded = read_columns(protocol, folder)
        rows = np.flatnonzero(recorded.judged_by(protocol.test))
        found = buckets(recorded.facts.select(rows))
        return Judged(recorded.rows.user_N[rows], recorded.rows.label_N[rows].astype(np.int64), found)

    def per_user(self, score_N: NDArray[np.float64], bucket: str) -> UserAuc:
        """AUC of each user in a bucket."""
        chosen = self.buckets[bucket]
        return user_auc(self.user_N[chosen], self.label_N[chosen], score_N[chosen])

    def figures(self, score_N: NDArray[np.float64], bucket: str) -> tuple[float, float]:
        """GAUC and AUC in a bucket."""
        chosen = self.buckets[bucket]
        return self.per_user(score_N, bucket).weighted, auc(self.label_N[chosen], score_N[chosen])


def scores(study: Path, model: str) -> dict[int, NDArray[np.float64]]:
    """Test scores of a model by seed."""
    found = {}
    for path in sorted((study / "scores").glob(f"{model}-*.npz")):
        seed = path.stem.removeprefix(f"{model}-")
        if seed.isdigit():
            with np.load(path) as stored:
                found[int(seed)] = stored["score"]
    return found


def compare(
    judged: Judged, ours: dict[int, NDArray[np.float64]], theirs: dict[int, NDArray[np.float64]], bucket: str
) -> tuple[float, float, float]:
    """GAUC of ours minus theirs over the seeds that both have, with its 95 % interval over users."""
    seeds = sorted(ours.keys() & theirs.keys())
    one, other = (mean_over_seeds([judged.per_user(each[seed], bucket) for seed in seeds]) for each in (ours, theirs))
    gain = Bootstrap(one, rng=np.random.default_rng([0, 41])).difference(one, other)
    return gain.difference, gain.low, gain.high


def models_table(document: dict[str, Any]) -> list[str]:
    """Models of one study, best first, each bucket as GAUC and AUC, and how far the reference is ahead."""
    at = {(row["model"], row["bucket"]): row for row in document["means"]}
    ahead = {(row["model"], row["bucket"]): row for row in document["paired"]}
    shown = [one for one in BUCKETS if any(bucket == one for _, bucket in at)]
    head = ["model", "seeds", *(f"{one}: GAUC [95 %] / AUC" for one in shown)]
    reference = document["paired"][0]["reference"] if document["paired"] else REFERENCE
    head += [f"{reference} minus it, {one}" for one in shown[:2]]
    names = sorted({model for model, _ in at}, key=lambda model: -at[model, shown[0]]["gauc"])
    rows = []
    for model in names:
        cells = [model, str(at[model, shown[0]]["seeds"])]
        for one in shown:
            row = at[model, one]
            interval = f"[{_short(row['ci_low'])}, {_short(row['ci_high'])}]"
            cells.append(f"{_short(row['gauc'])} {interval} / {_short(row['auc'])}")
        for one in shown[:2]:
            gain = ahead.get((model, one))
            cells.append(_gain(gain["difference"], gain["low"], gain["high"]) if gain else "")
        rows.append(cells)
    return markdown_table(head, rows)


def variants_table(judged: Judged, studies: dict[str, Path], listed: Collection[str]) -> list[str]:
    """CiUBM with other vectors and without its parts, beside CiUBM as it is; over the seeds that both have.

    Below them models that are not `listed` in the study's report, because they have fewer seeds.
    """
    whole = scores(studies["csft"], REFERENCE)
    others = [kind for kind in studies if kind != "csft"]
    variants = [(f"vectors: {kind}", kind, REFERENCE) for kind in others]
    variants += [(name.removeprefix(f"{REFERENCE}-").replace("-", " "), "csft", name) for name in registry.ABLATIONS]
    variants += [(f"another model: {name}", "csft", name) for name in registry.MODELS if name not in listed]
    shown = ("overall", "cold")
    rows = []
    for label, kind, model in variants:
        mine = scores(studies[kind], model)
        seeds = sorted(mine.keys() & whole.keys())
        if not seeds:
            continue
        cells = [label, str(len(seeds))]
        for bucket in shown:
            figures = [judged.figures(mine[seed], bucket) for seed in seeds]
            cells.append(" / ".join(_short(float(np.mean(values))) for values in zip(*figures, strict=True)))
        rows.append([*cells, *(_gain(*compare(judged, whole, mine, bucket)) for bucket in shown)])
    if not rows:
        return []
    head = ["CiUBM", "seeds", "overall: GAUC / AUC", "cold: GAUC / AUC"]
    return markdown_table([*head, "whole with C-SFT vectors minus it, overall", "the same, cold"], rows)


def page(folder: Path, studies: Path) -> tuple[str, dict[str, Any]]:
    """Markdown, and the figures behind it."""
    lines: list[str] = [f"# {folder.name}", ""]
    kept: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        found: dict[str, Path] = {kind: studies / f"{protocol}-{kind}" for kind in VECTOR_KINDS}
        found = {kind: path for kind, path in found.items() if (path / "report.json").exists()}
        if "csft" not in found:
            continue
        documents = {kind: json.loads((path / "report.json").read_text()) for kind, path in found.items()}
        whole = documents["csft"]
        lines += [f"## {protocol}", "", *(f"- {one}" for one in statements(whole)), "", *models_table(whole), ""]
        listed = {row["model"] for row in whole["means"]}
        variants = variants_table(Judged.of(folder, protocol), found, listed)
        if variants:
            lines += [f"### Controls and ablations, {protocol}", "", *variants, ""]
        kept[protocol] = {
            kind: {name: one[name] for name in ("about", "means", "paired", "tuning", "cost")}
            for kind, one in documents.items()
        }
    return "\n".join(lines), kept


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".")


def _gain(difference: float, low: float, high: float) -> str:
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]".replace("0.", ".")


def main() -> None:
    """Write OUT.md and OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="data-set folder")
    parser.add_argument("studies", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    text, kept = page(options.folder, options.studies)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    rounded = json.loads(json.dumps(kept), parse_float=lambda number: round(float(number), 5))
    options.out.with_suffix(".json").write_text(json.dumps(rounded, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
