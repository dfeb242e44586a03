"""What each ingredient of C-SFT is worth: arms by seeds, on data-set folders.

    python -m tests.benchmarks.csft_study DIR [DIR ...] [--seeds 3] [--arms default,...] [--catalogue FILE]
                                          [--end-to-end] [--features DIR] [--out tests/benchmarks/results]

Heads over cached features, but for the end-to-end arms. Settings were chosen on each set's validation span; the test
span stands beside it and chooses nothing. Resumable: a row that stands in the results file is not run again. Features
come from the product's own cache, or from files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from encoders.base import ItemContent
from encoders.feature_cache import content_key
from encoders.features import ItemFeatures, attribute_columns, word_hashes
from encoders.fusion import ItemFusion, ItemSource
from encoders.fusion_config import FusionConfig
from encoders.similarity import unit_or_zero_rows
from encoders.tuning_config import TuningConfig
from streams.encoder_training.bundle_builder import BundleBuilder, contents_of
from streams.settings import load_settings
from tests.benchmarks import backbones
from tests.benchmarks.csft_arms import ARMS, CATALOGUE_ARMS, END_TO_END_ARMS, Arm
from tests.benchmarks.csft_tables import REFERENCES, cell, plot, render
from trainer.csft import health
from trainer.csft.config import CsftConfig
from trainer.csft.pretrain import pretrain
from trainer.csft.run import CsftRun, learn, padded
from trainer.datasets.folder import open_data_set
from trainer.datasets.spans import BehaviourLog, Span
from trainer.offline import encoder_report
from trainer.samples.numbering import FeatureNumbers


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Items of which the first ones are the data set's; the others are only candidates."""

    features: ItemFeatures
    numbers: FeatureNumbers


class Bench:
    """One data set with its features, pairs and questions."""

    def __init__(self, folder: Path, features: Path | None, catalogue: Path | None) -> None:
        self.settings = load_settings()
        self.data = open_data_set(folder, attributes=("cold_holdout",))
        self.log = BehaviourLog.of(self.data, folder)
        self.contents = list(contents_of(self.data))
        self._folder, self._catalogue = features, catalogue
        keys = [content_key(content) for content in self.contents]
        self.items = Catalogue(self._features(self.data.name, self.contents), FeatureNumbers(self.data.item_ids, keys))
        self.csft = self.settings.csft
        self.pairs = self.log.pairs(
            self.log.learn, self.items.numbers, history_length=self.csft.history_length, seed=self.csft.seed
        )
        self.spans = {"validation": self.log.validation, "test": self.log.test}
        self.questions = {name: encoder_report.questions_of(self.log, span) for name, span in self.spans.items()}

    @cached_property
    def workshop(self) -> BundleBuilder:
        """Towers."""
        return BundleBuilder(self.settings.encoder, self.settings.encoders)

    def _features(self, name: str, contents: Sequence[ItemContent]) -> ItemFeatures:
        if self._folder is not None:
            return read_features(self._folder / f"{name}.npz", contents)
        return self.workshop.features(contents)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The whole catalogue, the data set's items first, with texts and pictures of the catalogue for all."""
        assert self._catalogue is not None
        table = pq.read_table(self._catalogue)
        rows = {str(item): place for place, item in enumerate(table["item_id"].to_pylist())}
        own = [rows.get(item, -1) for item in self.data.item_ids]
        order = [*own, *sorted(set(range(len(rows))) - set(own))]
        contents = [
            self.contents[place] if row < 0 else _content(table.slice(row, 1).to_pylist()[0])
            for place, row in enumerate(order)
        ]
        keys = [content_key(content) for content in contents]
        ids = [*self.data.item_ids, *(content.item_id for content in contents[len(own) :])]
        return Catalogue(self._features("catalogue", contents), FeatureNumbers(ids, keys))

    @cached_property
    def weaker(self) -> ItemFeatures:
        """Features of both weaker towers."""
        text = backbones.token_vectors(self.contents)
        image = backbones.mobilenet(self.contents)
        return replace(self.items.features, text_NT=text, image_NI=image)

    def references(self) -> dict[str, Any]:
        """Rows that nothing is trained for."""
        rows: dict[str, Any] = {}
        for span, at in self.spans.items():
            asked = self.questions[span]
            rows.setdefault("popularity", {})[span] = encoder_report.popularity(self.log, at, asked)
            for name, features, sides in (
                ("frozen text", self.items.features, {"image": False}),
                ("frozen image", self.items.features, {"text": False}),
                ("frozen text + image", self.items.features, {}),
                ("frozen, weaker towers", self.weaker, {}),
            ):
                vectors = encoder_report.frozen_vectors(features, **sides)
                rows.setdefault(name, {})[span] = encoder_report.recalls(vectors, self.log, at, asked)
        return rows

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """One arm with one seed."""
        if "tuning" in arm:
            return self._end_to_end(arm, seed)
        started = time.process_time()
        place = self.catalogue if arm.get("catalogue") else self.items
        features = self._changed(place.features, arm, seed)
        config = CsftConfig(**(self.csft.model_dump() | {"seed": seed} | arm.get("csft", {})))
        shape = FusionConfig(**(self.settings.fusion.model_dump() | arm.get("fusion", {})))
        if arm.get("scl"):
            config, shape = config.as_scl(), shape.model_copy(update={"kind": "mean"})
        known = self.log.published(self.log.learn)
        fusion = self._started(shape, features, known, seed)
        items = padded(fusion, features)
        if arm.get("pretrain"):
            before = padded(fusion, features.select(np.flatnonzero(known[1:])))
            pretrain(self.settings.pretrain.model_copy(update={"seed": seed}), fusion, before)
        trained = None if arm.get("skip_csft") else self._learn(config, fusion, items, place.numbers, known)
        return self._judged(fusion, items, config, trained, started)

    def _end_to_end(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Continue from the default: train the towers too, or the same steps on heads alone."""
        known = self.log.published(self.log.learn)
        fusion = self._started(self.settings.fusion, self.items.features, known, seed)
        config = self.csft.model_copy(update={"seed": seed})
        self._learn(config, fusion, padded(fusion, self.items.features), self.items.numbers, known)
        started = time.process_time()
        tuning = TuningConfig(**arm["tuning"])
        items, towers = self.workshop.items(fusion, self.items.features, self.contents, tuning)
        config = CsftConfig(**(config.model_dump() | arm["csft"]))
        trained = self._learn(
            config, fusion, items, self.items.numbers, known, towers=towers, tower_learning_rate=tuning.learning_rate,
            on_step=lambda report, total: print(f"{report.step} of {total}: {report.loss:.4f}", flush=True),
        )  # fmt: skip
        return self._judged(fusion, items, config, trained, started)

    def _started(self, shape: FusionConfig, features: ItemFeatures, known: NDArray[np.bool_], seed: int) -> ItemFusion:
        torch.manual_seed(seed)
        fusion = ItemFusion(shape, text_width=features.text_NT.shape[1], image_width=features.image_NI.shape[1])
        fusion.fit(features.select(np.flatnonzero(known[1:])))
        return fusion

    def _learn(
        self,
        config: CsftConfig,
        fusion: ItemFusion,
        items: ItemSource,
        numbers: FeatureNumbers,
        known: NDArray[np.bool_],
        **more: Any,
    ) -> CsftRun:
        usable = np.zeros(len(items), bool)
        usable[: len(known)] = known & ~self.log.held_out
        return learn(config, fusion, items, numbers, self.pairs, usable=usable, **more)

    def _judged(
        self, fusion: ItemFusion, items: ItemSource, config: CsftConfig, trained: CsftRun | None, started: float
    ) -> dict[str, Any]:
        views = fusion.embed(items)
        own = slice(len(self.log.held_out))
        vectors, everything = views.fused_ND.numpy()[own], views.fused_ND.numpy()
        row: dict[str, Any] = {
            span: encoder_report.recalls(vectors, self.log, at, self.questions[span]) for span, at in self.spans.items()
        }
        for width in fusion.config.nested_widths:
            prefix = unit_or_zero_rows(vectors[:, :width])
            row[f"test_{width}"] = encoder_report.recalls(prefix, self.log, self.log.test, self.questions["test"])
        if trained is not None and trained.last is not None:
            row["test_with_popularity"] = encoder_report.recalls_with_popularity(
                vectors, self.log, self.log.test, self.questions["test"],
                temperature=trained.last.temperature, strength=config.log_q_strength,
            )  # fmt: skip
        if len(everything) > len(vectors):
            for span, at in self.spans.items():
                row[f"{span}_catalogue"] = self._among(everything, at, self.questions[span])
        geometry = encoder_report.geometry_of(views, self.questions["validation"])
        why = health.collapse(
            geometry,
            loss_share=trained.loss_share if trained and config.log_q_strength == 0 else None,
            cosine_limit=config.collapse_cosine,
            loss_limit=config.collapse_loss_share,
        )
        return row | {
            "geometry": asdict(geometry),
            "collapse": why,
            "steps": trained.steps if trained else 0,
            "temperature": trained.last.temperature if trained and trained.last else None,
            "cpu_seconds": round(time.process_time() - started, 1),
        }

    def _among(
        self, vectors_ND: NDArray[np.float32], at: Span, questions: dict[str, health.Questions]
    ) -> dict[str, Any]:
        cold = np.zeros(len(vectors_ND), bool)
        cold[: len(self.log.held_out)] = self.log.cold(at)
        return {
            kind: health.recall_at_k(
                health.queries(vectors_ND, asked), vectors_ND, asked, cold, k=encoder_report.K
            ).as_dict()
            for kind, asked in questions.items()
        }

    def _changed(self, features: ItemFeatures, arm: Arm, seed: int) -> ItemFeatures:
        if "text" in arm.get("towers", ()):
            features = replace(features, text_NT=self.weaker.text_NT)
        if "image" in arm.get("towers", ()):
            features = replace(features, image_NI=self.weaker.image_NI)
        if arm.get("shuffle"):
            features = features.select(np.random.default_rng(seed).permutation(len(features)))
        blank = {"text": ("image_NI", "has_image_N"), "image": ("text_NT", "has_text_N")}.get(arm.get("only", ""), ())
        return replace(features, **{name: np.zeros_like(getattr(features, name)) for name in blank})


def _content(row: dict[str, Any]) -> ItemContent:
    item_id, title, text = str(row["item_id"]), row["title"] or "", row["text"] or ""
    return ItemContent(item_id=item_id, title=title, text=text, category=row["category"], image=row["image"])


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
        [word_hashes(content.attributes) for content in contents],
    )
    return ItemFeatures(
        arrays["text_features"][rows].astype(np.float32),
        np.nan_to_num(arrays["image_features"][rows]).astype(np.float32) * has_image[:, None],
        np.ones(len(rows), bool),
        has_image,
        **columns,  # type: ignore[arg-type]
    )


def main() -> None:
    """Run what is missing, write JSON, table and plot after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", help="names separated by semicolons (default: all that the options allow)")
    parser.add_argument("--catalogue", type=Path, help="parquet file of a larger catalogue of the first folder's shop")
    parser.add_argument("--end-to-end", action="store_true", help="also towers that learn: first folder, first seed")
    parser.add_argument("--features", type=Path, help="folder with DIR.npz per set (default: the product's cache)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "csft_study.json"
    benches: dict[Path, Bench] = {}

    def bench(folder: Path) -> Bench:
        if folder not in benches:
            catalogue = options.catalogue if folder == options.folders[0] else None
            benches[folder] = Bench(folder, options.features, catalogue)
        return benches[folder]

    for folder, name, seed, arm in _plan(options):
        # read anew each time: another process may be at other rows
        rows = _read(path).get(folder.resolve().name, {})
        if str(seed) in rows.get(name, {}):
            continue
        if arm is None:
            found = bench(folder).references()
            _store(path, folder, {reference: found[reference] for reference in REFERENCES}, seed)
            continue
        row = bench(folder).run(arm, seed)
        print(f"{folder.name} | {name} | seed {seed} | {shown(row)}", flush=True)
        _store(path, folder, {name: row}, seed)
    results = _read(path)
    (options.out / "csft_study.md").write_text(render(results))
    plot(results, options.out / "csft_study.png")


def _plan(options: argparse.Namespace) -> list[tuple[Path, str, int, Arm | None]]:
    """Seeds outermost: what is cut short is cut short evenly. No arm stands for the references."""
    chosen = options.arms.split(";") if options.arms else [*ARMS, *CATALOGUE_ARMS, *END_TO_END_ARMS]
    plan: list[tuple[Path, str, int, Arm | None]] = []
    for seed in range(options.seeds):
        for folder in options.folders:
            if seed == 0:
                plan.append((folder, REFERENCES[0], 0, None))
            arms = dict(ARMS)
            if folder == options.folders[0]:
                arms |= CATALOGUE_ARMS if options.catalogue else {}
                arms |= END_TO_END_ARMS if options.end_to_end and seed == 0 else {}
            plan += [(folder, name, seed, arm) for name, arm in arms.items() if name in chosen]
    return plan


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _one_line_a_run(results: dict[str, dict[str, Any]]) -> str:
    sets = []
    for name, runs in results.items():
        lines = ",\n".join(f"  {json.dumps(run)}: {json.dumps(found)}" for run, found in runs.items())
        sets.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(sets) + "\n}\n"


def _store(path: Path, folder: Path, found: dict[str, Any], seed: int) -> None:
    results = _read(path)
    rows = results.setdefault(folder.resolve().name, {})
    for name, row in found.items():
        rows.setdefault(name, {})[str(seed)] = row
    order = [*REFERENCES, *ARMS, *CATALOGUE_ARMS, *END_TO_END_ARMS]
    results[folder.resolve().name] = {name: rows[name] for name in order if name in rows}
    path.write_text(_one_line_a_run(results))
    path.with_suffix(".md").write_text(render(results))


def shown(row: dict[str, Any]) -> str:
    """The validation span in a line."""
    recalls = "; ".join(f"{kind} {cell([found])}" for kind, found in row["validation"].items())
    return f"validation {recalls}; {row['cpu_seconds']} cpu s"


if __name__ == "__main__":
    main()
