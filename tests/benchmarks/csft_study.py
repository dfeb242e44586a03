"""What each ingredient of C-SFT is worth: heads over cached features, arms by seeds, on data-set folders.

    python tests/benchmarks/csft_study.py DIR [DIR ...] [--seeds 3] [--arms default,...]
                                          [--features DIR] [--out tests/benchmarks/results]

Settings were chosen on each set's validation span; the test span stands beside it and chooses nothing. Resumable: a row
that stands in the results file already is not run again. Features come from the product's own cache, or from files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoders.base import ItemContent
from encoders.features import ItemFeatures, attribute_columns
from encoders.fusion import ItemFusion
from encoders.fusion_config import FusionConfig
from streams import encoder_report
from streams.behaviour_spans import BehaviourLog
from streams.datasets import open_data_set
from streams.encoder_training import Workshop, contents_of
from streams.feature_cache import content_key
from streams.settings import load_settings
from trainer import health
from trainer.csft_config import CsftConfig
from trainer.csft_run import learn, padded
from trainer.numbering import FeatureNumbers
from trainer.pretrain import pretrain

Arm = dict[str, Any]
BANK = {"time_negatives": 1024, "bank_takes": 8192}
NAIVE = BANK | {"bank_rows": "stored", "momentum": 0.0, "bank_age_half_life_steps": 1e9, "bank_warmup_share": 0.0}

# name: what differs from the defaults. "csft" and "fusion" are settings; stage 1 runs first where "pretrain" says so
ARMS: dict[str, Arm] = {
    "stage 2 (default)": {},
    "few pairs: temperature .05 and 8 epochs and .2 hidden": {
        "csft": {"temperature": 0.05, "epochs": 8, "drop_features": 0.2}
    },
    "temperature .2": {"csft": {"temperature": 0.2}},
    "logQ 1 (for plain recall)": {"csft": {"log_q_strength": 1.0}},
    "stage 1 only": {"pretrain": True, "skip_csft": True},
    "stage 1 + 2": {"pretrain": True},
    "logQ 0 (for click models)": {"csft": {"log_q_strength": 0.0}},
    "uncentred and logQ 1": {"csft": {"log_q_strength": 1.0, "centred": False}},
    "no multi-level": {"csft": {"image_level": 0.0, "title_level": 0.0}},
    "no hard negatives": {"csft": {"hard_negatives": False}},
    "no masks": {"csft": {"masks": False}},
    "no attributes": {"fusion": {"category": False, "year": False, "price": False}},
    "bank 1024": {"csft": BANK},
    "batch 64": {"csft": {"batch_pairs": 64}},
    "batch 64 + bank 1024": {"csft": BANK | {"batch_pairs": 64}},
    "batch 64 + naive bank": {"csft": NAIVE | {"batch_pairs": 64}},
    "SCL": {"scl": True},
    "shuffled content": {"shuffle": True},
    "tensor fusion": {"fusion": {"kind": "tensor"}},
    "text only": {"only": "text"},
    "image only": {"only": "image"},
}


class Bench:
    """One data set with its features, pairs and questions."""

    def __init__(self, folder: Path, features: Path | None) -> None:
        settings = load_settings()
        data = open_data_set(folder, attributes=("cold_holdout",))
        self.name = data.name
        self.log = BehaviourLog.of(data, folder)
        contents = list(contents_of(data))
        if features is None:
            self.features = Workshop(settings.encoder, settings.encoders).features(contents)
        else:
            self.features = read_features(features, contents)
        self.numbers = FeatureNumbers(data.item_ids, [content_key(content) for content in contents])
        self.csft, self.fusion, self.pretrain = settings.csft, settings.fusion, settings.pretrain
        self.pairs = self.log.pairs(
            self.log.learn, self.numbers, history_length=self.csft.history_length, seed=self.csft.seed
        )
        self.spans = {"validation": self.log.validation, "test": self.log.test}
        self.questions = {name: encoder_report.questions_of(self.log, span) for name, span in self.spans.items()}

    def references(self) -> dict[str, Any]:
        """Rows that nothing is trained for."""
        rows: dict[str, Any] = {}
        for span, at in self.spans.items():
            asked = self.questions[span]
            rows.setdefault("popularity", {})[span] = encoder_report.popularity(self.log, at, asked)
            for name, sides in (
                ("frozen text", {"image": False}),
                ("frozen image", {"text": False}),
                ("frozen text + image", {}),
            ):
                vectors = encoder_report.frozen_vectors(self.features, **sides)
                rows.setdefault(name, {})[span] = encoder_report.recalls(vectors, self.log, at, asked)
        return rows

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """One arm with one seed."""
        started = time.process_time()
        features = _changed(self.features, arm, seed)
        config = CsftConfig(**(self.csft.model_dump() | {"seed": seed} | arm.get("csft", {})))
        shape = FusionConfig(**(self.fusion.model_dump() | arm.get("fusion", {})))
        if arm.get("scl"):
            config, shape = config.as_scl(), shape.model_copy(update={"kind": "mean"})
        torch.manual_seed(seed)
        fusion = ItemFusion(shape, text_width=features.text_NT.shape[1], image_width=features.image_NI.shape[1])
        known = self.log.published(self.log.learn)
        fusion.fit(features.take(np.flatnonzero(known[1:])))
        items = padded(fusion, features)
        if arm.get("pretrain"):
            before = padded(fusion, features.take(np.flatnonzero(known[1:])))
            pretrain(self.pretrain.model_copy(update={"seed": seed}), fusion, before)
        trained = None
        if not arm.get("skip_csft"):
            trained = learn(config, fusion, items, self.numbers, self.pairs, usable=known & ~self.log.held_out)
        views = fusion.embed(items)
        vectors = views.fused_ND.numpy()
        row: dict[str, Any] = {
            span: encoder_report.recalls(vectors, self.log, at, self.questions[span]) for span, at in self.spans.items()
        }
        for width in shape.nested_widths:
            prefix = encoder_report.unit_rows(vectors[:, :width])
            row[f"test_{width}"] = encoder_report.recalls(prefix, self.log, self.log.test, self.questions["test"])
        geometry = encoder_report.geometry_of(views, self.questions["validation"])
        why = health.collapse(
            geometry,
            loss_share=trained.loss_share if trained and config.log_q_strength == 0 else None,
            cosine_limit=config.collapse_cosine,
            loss_limit=config.collapse_loss_share,
        )
        return row | {
            "geometry": encoder_report.geometry_dict(geometry),
            "collapse": why,
            "steps": trained.steps if trained else 0,
            "temperature": trained.last.temperature if trained and trained.last else None,
            "cpu_seconds": round(time.process_time() - started, 1),
        }


def read_features(path: Path, contents: Sequence[ItemContent]) -> ItemFeatures:
    """Features that the same towers made elsewhere: arrays item_id, text_features, image_features, has_image."""
    arrays = np.load(path)
    place = {str(item): row for row, item in enumerate(arrays["item_id"])}
    rows = np.array([place[content.item_id] for content in contents])
    has_image = arrays["has_image"][rows]
    columns = attribute_columns(
        [content.category for content in contents],
        [content.year for content in contents],
        [content.price for content in contents],
    )
    return ItemFeatures(
        arrays["text_features"][rows].astype(np.float32),
        np.nan_to_num(arrays["image_features"][rows]).astype(np.float32) * has_image[:, None],
        np.ones(len(rows), bool),
        has_image,
        **columns,  # type: ignore[arg-type]
    )


def _changed(features: ItemFeatures, arm: Arm, seed: int) -> ItemFeatures:
    if arm.get("shuffle"):
        features = features.take(np.random.default_rng(seed).permutation(len(features)))
    if arm.get("only") == "text":
        features = replace(
            features, image_NI=np.zeros_like(features.image_NI), has_image_N=np.zeros_like(features.has_image_N)
        )
    if arm.get("only") == "image":
        features = replace(
            features, text_NT=np.zeros_like(features.text_NT), has_text_N=np.zeros_like(features.has_text_N)
        )
    return features


def render(results: dict[str, Any]) -> str:
    """The results as Markdown: mean over seeds, with the range where there are several."""
    lines = ["# C-SFT study", "", "Recall@50 of the next taken item: all / cold among all / cold among cold.", ""]
    for name, rows in results.items():
        kinds = sorted({kind for seeds in rows.values() for row in seeds.values() for kind in row["test"]})
        lines += [f"## {name}", ""]
        header = ["arm", "seeds", *(f"{kind} {span}" for kind in kinds for span in ("validation", "test")), "cosine"]
        lines += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        for arm, seeds in rows.items():
            cells = [
                _cell([row[span][kind] for row in seeds.values()]) for kind in kinds for span in ("validation", "test")
            ]
            cosines = [row["geometry"]["mean_pairwise_cosine"] for row in seeds.values() if "geometry" in row]
            shown = f"{np.mean(cosines):.2f}" if cosines else ""
            shown += " **collapsed**" if any(row.get("collapse") for row in seeds.values()) else ""
            lines.append(f"| {arm} | {len(seeds)} | " + " | ".join(cells) + f" | {shown} |")
        lines.append("")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    parts = []
    for key in ("all", "cold", "cold_among_cold"):
        values = [row[key] for row in rows if row[key] is not None]
        spread = f"±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 and key == "cold_among_cold" else ""
        parts.append(f"{np.mean(values):.3f}{spread}".replace("0.", ".") if values else "-")
    return " / ".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
    """Cold among cold on the test span, arm by arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(7 * len(results), 7), squeeze=False)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        kind = "basket" if any("basket" in row["test"] for row in next(iter(rows.values())).values()) else "next"
        arms = list(rows)
        means = [np.mean([row["test"][kind]["cold_among_cold"] or 0 for row in rows[arm].values()]) for arm in arms]
        axis.barh(arms[::-1], means[::-1], color=["#888" if arm in REFERENCES else "#27c" for arm in arms[::-1]])
        axis.set_title(f"{name}: {kind}, cold among cold, recall@50, test span")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


REFERENCES = ("popularity", "frozen text", "frozen image", "frozen text + image")


def main() -> None:
    """Run what is missing, write JSON, table and plot after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--features", type=Path, help="folder with DIR.npz per set (default: the product's cache)")
    parser.add_argument("--arms", help="names separated by commas (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "csft_study.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    chosen = options.arms.split(",") if options.arms else list(ARMS)
    benches: dict[Path, Bench] = {}
    # seeds outermost: what is cut short is cut short evenly
    for seed in range(options.seeds):
        for folder in options.folders:
            rows = results.setdefault(folder.resolve().name, {})
            todo = [arm for arm in chosen if str(seed) not in rows.get(arm, {})]
            if not todo and all(name in rows for name in REFERENCES):
                continue
            if folder not in benches:
                file = options.features / f"{folder.resolve().name}.npz" if options.features else None
                benches[folder] = Bench(folder, file)
            bench = benches[folder]
            if any(name not in rows for name in REFERENCES):
                for name, row in bench.references().items():
                    rows[name] = {"0": row}
            for arm in todo:
                row = bench.run(ARMS[arm], seed)
                rows.setdefault(arm, {})[str(seed)] = row
                print(f"{bench.name} | {arm} | seed {seed} | {_shown(row)}", flush=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
                (options.out / "csft_study.md").write_text(render(results))
    (options.out / "csft_study.md").write_text(render(results))
    plot(results, options.out / "csft_study.png")


def _shown(row: dict[str, Any]) -> str:
    recalls = "; ".join(f"{kind} {_cell([found])}" for kind, found in row["validation"].items())
    return f"validation {recalls}; {row['cpu_seconds']} cpu s"


if __name__ == "__main__":
    main()
