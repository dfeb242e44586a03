"""What the topics teach: searches of users without a past, the final kind of a take, and what is left out."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from encoders.base import ItemContent
from encoders.features import ItemFeatures
from encoders.fusion import FusionInput, ItemFusion, Views
from encoders.fusion_config import FusionConfig
from encoders.similarity import unit_or_zero_rows
from encoders.trained import TrainingManifest
from encoders.tuning_config import TuningConfig
from schemas.behaviours import Behaviour, BehaviourKind
from schemas.errors import Misconfigured
from schemas.items import ItemPublished
from streams.encoder_training.csft import PairData, train_bundle
from streams.encoder_training.pair_report import pair_report
from streams.encoder_training.pretrain import pretrain_bundle
from streams.encoder_training.topic_input import TopicContent
from streams.encoder_training.topic_pairs import in_event_time, topic_pairs
from tests.factories.csft import SMALL, features_of, make_fusion
from tests.factories.samples import behaviour
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.csft.pairs import AnchorKind, Pair
from trainer.csft.run import learn, padded
from trainer.samples.config import JoinConfig
from trainer.samples.rows import Impression

ITEMS = 40
LOG = JoinConfig(lateness_seconds=10.0, correction_seconds=600.0, purchase_correction_seconds=3600.0)
CONFIG = CsftConfig(batch_pairs=16, epochs=4, hard_negatives=False)


def base64_of(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def published(number: int) -> ItemPublished:
    picture = base64_of(b"item %d" % number)
    return ItemPublished(
        item_id=f"i{number}", title=f"thing {number}", image=picture, published_at=datetime(2023, 1, 1, tzinfo=UTC)
    )


def log_of(events: Sequence[Behaviour]) -> TopicContent:
    items = {item.item_id: item for item in map(published, range(ITEMS))}
    ordered = sorted(events, key=lambda event: event.occurred_at)
    return TopicContent(items=items, behaviours=[(0, offset, event) for offset, event in enumerate(ordered)])


def take(name: str, kind: str, user: str, item: int, second: float, **more: Any) -> Behaviour:
    return behaviour(name, kind, user=user, item=f"i{item}", second=second, **more)


def look(name: str, second: float, user: str, item: int, *kinds: str, after: float = 1.0, **search: Any) -> list[Any]:
    """An exposure, and takes of it `after` seconds each."""
    takes = [
        take(f"{name}-{kind}", kind, user, item, second + after * n, exposure_id=name)
        for n, kind in enumerate(kinds, 1)
    ]
    return [behaviour(name, user=user, item=f"i{item}", second=second, **search), *takes]


def pairs_of(events: Sequence[Behaviour], config: CsftConfig = CONFIG) -> PairData:
    return topic_pairs(log_of(events), features_of, config, name="t", log=LOG)


def searches(count: int, **search: Any) -> list[Behaviour]:
    """Each of a user who is never seen before or after; photo n finds item n."""
    photos = [base64_of(b"photo of %d" % (n % ITEMS)) for n in range(count)]
    given = [{"query_image": photo} | search for photo in photos]
    return [e for n in range(count) for e in look(f"s{n}", 100 * n, f"u{n}", n % ITEMS, "purchase", **given[n])]


def trained_report(data: PairData, config: CsftConfig = CONFIG) -> tuple[int, dict[str, Any]]:
    """Pairs of the last step, and the report on those held back."""
    fusion = make_fusion(data.features)
    items = padded(fusion, data.features)
    run = learn(config, fusion, items, data.numbers, data.learned, usable=data.usable)
    assert run.last is not None
    return run.last.pairs, data.reports(fusion, fusion.embed(items), run.last)["validation"]


@pytest.mark.parametrize("search", [{}, {"query_image": None, "query_text": "words"}], ids=["photo", "words"])
def test_searches_of_users_without_a_past_teach_and_count_in_recall(search: dict[str, Any]) -> None:
    data = pairs_of(searches(32, **search), config := CONFIG.model_copy(update={"batch_pairs": 29}))
    kind = "query_text" if search else "query_image"
    assert data.counts["anchors"] == {"query_image": 0, "query_text": 0, "trigger_item": 0} | {kind: 32}
    learned, report = trained_report(data, config)
    assert learned == len(data.learned) == 29
    for vectors in ("popularity", "frozen", "trained"):
        names = {kind} if vectors == "popularity" else {kind, f"{kind}_at_1", f"{kind}_at_5"}
        assert {asked: recall["questions"] for asked, recall in report[vectors].items()} == dict.fromkeys(names, 3)


def test_a_photo_finds_what_was_taken_after_it_once_that_was_learned() -> None:
    # photo n and item n have nothing in common but the takes; the last ones are asked again
    data = pairs_of(searches(400))
    config = CONFIG.model_copy(update={"epochs": 6, "learning_rate": 1e-2})
    fusion = make_fusion(data.features)
    items = padded(fusion, data.features)
    learn(config, fusion, items, data.numbers, data.learned, usable=data.usable)
    views = fusion.embed(items)
    photos = unit_or_zero_rows(views.image_ND.numpy()[ITEMS + 1 :])
    ranked = np.argsort(-(photos @ views.fused_ND.numpy()[1 : ITEMS + 1].T), axis=1)
    wanted = [data.pairs[n].row.item - 1 for n in range(ITEMS)]
    assert np.mean([wanted[n] in ranked[n, :5] for n in range(ITEMS)]) > 0.6


def test_queries_are_no_answers_and_take_no_place_among_them() -> None:
    data = pairs_of(searches(40))
    _, report = trained_report(data)
    # 40 items, and recall at 50: with the photos among the answers it would be less
    assert report["trained"]["query_image"]["all"] == report["frozen"]["query_image"]["all"] == 1.0


def test_a_search_whose_photo_cannot_be_read_falls_back_on_what_the_user_took_and_is_counted() -> None:
    broken = [e for n in range(3) for e in look(f"b{n}", 9_000 + n, "u0", 20 + n, "click", query_image="eA==")]
    data = pairs_of([*searches(20), *broken])
    assert data.counts["unreadable_queries"] == 1
    assert [pair.anchor_kind for pair in data.pairs[20:]] == [AnchorKind.TRIGGER_ITEM] * 3
    assert data.pairs[20].anchor == (data.pairs[0].row.item,)


WORDS = {"query_text": "words"}
LATE = {
    "a click that became a purchase": look("a", 50_000, "z", 7, "click", "purchase", after=500.0, **WORDS),
    "a purchase half an hour later": look("a", 50_000, "z", 7, "purchase", after=1_800.0, **WORDS),
    "a purchase at a second look": [
        *look("a", 50_000, "z", 7, "click", **WORDS),
        *look("b", 52_000, "z", 7, "purchase"),
    ],
}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE.keys())
def test_a_take_weighs_by_its_final_kind_within_the_window_of_that_kind(late: list[Behaviour]) -> None:
    data = pairs_of([*searches(20), *late, *look("end", 90_000, "other", 3)])
    assert [pair.kind for pair in data.pairs if pair.row.user_id == "z"] == [BehaviourKind.PURCHASE]


TOO_LATE = {
    "a click after its window": (look("a", 50_000, "z", 7, "click", after=661.0, **WORDS), []),
    "a purchase after its window": (
        [*look("a", 50_000, "z", 7, "click", **WORDS), take("p", "purchase", "z", 7, 53_661, exposure_id="a")],
        [BehaviourKind.CLICK],
    ),
    "a second look after the window": (
        [*look("a", 50_000, "z", 7, "click", **WORDS), *look("b", 53_661, "z", 7, "purchase")],
        [BehaviourKind.CLICK],
    ),
}


@pytest.mark.parametrize(("late", "kinds"), TOO_LATE.values(), ids=TOO_LATE.keys())
def test_what_comes_after_the_window_of_its_kind_changes_nothing(
    late: list[Behaviour], kinds: list[BehaviourKind]
) -> None:
    data = pairs_of([*searches(20), *late, *look("end", 90_000, "other", 3)])
    assert [pair.kind for pair in data.pairs if pair.row.user_id == "z"] == kinds


def test_corrected_pairs_stay_in_the_order_in_which_their_items_were_shown() -> None:
    late = look("a", 950, "z", 7, "purchase", after=1_800.0, **WORDS)
    data = pairs_of([*searches(40), *late])
    seconds = [pair.row.second for pair in data.pairs]
    assert seconds == sorted(seconds) and [pair.row.user_id for pair in data.pairs].index("z") == 10


def test_takes_that_make_no_pair_are_counted_in_the_report_and_in_the_refusal() -> None:
    first, again = look("a", 10, "v", 1, "click"), look("b", 20, "v", 1, "click")
    data = pairs_of([*searches(20), *first, *again])
    assert data.counts["no_pair"] == {"taken_before": 1, "item_not_learned": 0, "no_anchor": 1}
    with pytest.raises(Misconfigured, match=r"make 0 pairs .*1 taken_before, 0 item_not_learned, 1 no_anchor"):
        pairs_of([*first, *again])


@pytest.mark.parametrize("kind", [AnchorKind.QUERY_IMAGE, AnchorKind.QUERY_TEXT])
def test_a_query_asks_with_the_view_that_it_was_trained_with(kind: AnchorKind) -> None:
    # query n points at item n with its own view, and away from it with the others
    items, at = 200, torch.eye(200)
    points = {AnchorKind.QUERY_IMAGE: at, AnchorKind.QUERY_TEXT: at}
    image, title = (points[kind] if own is kind else -at for own in points)
    padding = torch.zeros(1, items)
    views = Views(*(torch.cat([padding, at, asking]) for asking in (image, title, -at)))
    rows = [Impression("e", 0, n, n, f"u{n}", n, (), (), False, False, label=1) for n in range(1, items + 1)]
    pairs = [Pair(row, kind, (items + row.item,), ()) for row in rows]
    features = features_of([ItemContent(title=f"{n}", image=b"%d-" % n) for n in range(2 * items)])

    def recall(view: Literal["fused", "same"]) -> Any:
        return pair_report([], pairs, items, features, views, anchor_view=view)["trained"][kind.value]["all"]

    assert (recall("fused"), recall("same")) == (1.0, 0.0)


@dataclass
class Builder:
    """A builder over made-up features, which keeps what is written."""

    parent: str = "mm128-0"
    cache: Any = field(default_factory=lambda: SimpleNamespace(computed=7))
    shapes: list[FusionConfig] = field(default_factory=list)
    fitted: list[int] = field(default_factory=list)
    written: list[tuple[TrainingManifest, Path | None]] = field(default_factory=list)

    def features(self, contents: Sequence[ItemContent]) -> ItemFeatures:
        return features_of(contents)

    def fusion(self, shape: FusionConfig, features: ItemFeatures, *, seed: int) -> ItemFusion:
        self.shapes.append(shape)
        self.fitted.append(len(features))
        return make_fusion(features, SMALL.model_copy(update={"kind": shape.kind}))

    def items(self, fusion: ItemFusion, features: ItemFeatures, *_: Any) -> tuple[FusionInput, None]:
        return padded(fusion, features), None

    def write(self, fusion: ItemFusion, training: TrainingManifest, out: Path | None, *, towers: Any) -> Any:
        self.written.append((training, out))
        return out or Path("place"), "csft16-1"


def trained(config: CsftConfig, *, dry_run: bool = False, out: Path | None = None) -> tuple[dict[str, Any], Builder]:
    builder: Any = Builder()
    data = pairs_of(searches(40), config)
    report = train_bundle(builder, data, config, FusionConfig(hidden=8), TuningConfig(), out=out, dry_run=dry_run)
    return report, builder


SHORT = CONFIG.model_copy(update={"epochs": 1})


def test_a_bundle_says_what_it_was_trained_on_and_not_what_it_was_judged_by() -> None:
    report, builder = trained(SHORT, out=Path("mine"))
    ((manifest, out),) = builder.written
    assert (report["bundle"], report["encoder_version"], out) == ("mine", "csft16-1", Path("mine"))
    assert (report["collapse"], report["steps"], report["pairs"], report["features_computed"]) == (None, 3, 36, 7)
    assert (manifest.stage, manifest.parent, manifest.data, manifest.pairs) == ("csft", "mm128-0", "t", 36)
    assert manifest.items == ITEMS + 40 and manifest.settings["epochs"] == 1 and manifest.made_at is not None
    data = pairs_of(searches(40), SHORT)
    assert (manifest.first_event_at, manifest.last_event_at) == tuple(
        datetime.fromtimestamp(pair.row.second, UTC) for pair in (data.pairs[0], data.pairs[35])
    )
    assert manifest.metrics == report["validation"] and report["data"] == "t" and report["behaviours"] == 80
    assert builder.shapes == [FusionConfig(hidden=8)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"collapse_cosine": -1.0}, "items look alike"),
        ({"collapse_loss_share": 0.01, "log_q_strength": 0.0}, "nothing is told apart"),
        ({"collapse_loss_share": 0.01, "log_q_strength": 0.5}, None),
    ],
)
def test_a_space_that_collapsed_is_never_written_and_a_corrected_loss_says_nothing(
    change: dict[str, Any], why: str | None
) -> None:
    report, builder = trained(SHORT.model_copy(update=change))
    if why is None:
        assert report["collapse"] is None and report["bundle"] == "place" and len(builder.written) == 1
    else:
        assert why in report["collapse"] and not builder.written
        assert report["bundle"] is report["encoder_version"] is None and report["validation"]


def test_a_fusion_begins_with_the_features_that_it_may_see() -> None:
    builder: Any = Builder()
    data = pairs_of(searches(40), SHORT)
    first = replace(data, fit_features=features_of(data.contents[:30]))
    train_bundle(builder, first, SHORT, FusionConfig(hidden=8), TuningConfig(), out=None, dry_run=True)
    assert builder.fitted == [30]


def test_a_dry_run_reports_and_writes_nothing() -> None:
    report, builder = trained(SHORT, dry_run=True)
    assert report["bundle"] is None and report["steps"] == 3 and not builder.written


def test_scl_has_its_sides_beside_each_other_and_nothing_else_changes_the_shape() -> None:
    scl = SHORT.as_scl().model_copy(update={"bank_takes": 8, "time_negatives": 8, "hard_loss": "info_nce"})
    assert trained(scl)[1].shapes == [FusionConfig(hidden=8, kind="mean")]
    assert trained(SHORT.model_copy(update={"anchor_view": "same"}))[1].shapes == [FusionConfig(hidden=8)]


@pytest.mark.parametrize(("count", "held_back"), [(20, 2), (24, 2), (26, 3), (40, 4)])
def test_twenty_pairs_are_enough_and_a_tenth_of_them_the_newest_judges(count: int, held_back: int) -> None:
    data = pairs_of(searches(count))
    assert [pair.row.user_id for pair in data.learned] == [f"u{n}" for n in range(count - held_back)]
    assert len(data.pairs) == count and data.usable.tolist() == [False, *[True] * ITEMS, *[False] * count]
    with pytest.raises(Misconfigured, match="which make 19 pairs"):
        pairs_of(searches(19))


def aligned(count: int, **change: Any) -> tuple[dict[str, Any], Builder]:
    builder: Any = Builder()
    contents = [ItemContent(title=f"thing {n}", image=b"photo %d" % n) for n in range(count)]
    config = PretrainConfig(epochs=2, batch_items=8)
    given = {"collapse_cosine": 0.9, "out": None} | change
    places = (builder, "items", contents, {"items": {0: 5}}, config, FusionConfig(hidden=8), TuningConfig())
    return pretrain_bundle(*places, **given), builder


def test_alignment_makes_a_bundle_of_two_items_or_more_that_did_not_collapse() -> None:
    report, builder = aligned(24, out=Path("mine"))
    ((manifest, out),) = builder.written
    assert (report["bundle"], report["encoder_version"], out) == ("mine", "csft16-1", Path("mine"))
    assert (report["stage"], report["items"], report["steps"]) == ("pretrain", 24, 6)
    assert (manifest.stage, manifest.items, manifest.offsets, manifest.data) == (
        "pretrain",
        24,
        {"items": {0: 5}},
        "items",
    )
    names = ("alignment_loss", "title_finds_image", "mean_pairwise_cosine")
    assert manifest.metrics == {name: report[name] for name in names}
    report, builder = aligned(24, collapse_cosine=-1.0)
    assert "items look alike" in report["collapse"] and report["bundle"] is None and not builder.written
    with pytest.raises(Misconfigured, match="items holds 1 items, pre-training needs at least 2"):
        aligned(1)


def test_events_keep_their_place_in_the_log() -> None:
    events = [take(f"t{n}", "click", "u", n, 5) for n in range(6)]
    found = TopicContent(behaviours=[(n % 2, 10 + n, event) for n, event in enumerate(events)])
    (second,) = in_event_time(found, 10.0)
    assert {(one.partition, one.offset, one.behaviour.event_id) for one in second} == {
        (n % 2, 10 + n, f"t{n}") for n in range(6)
    }


@pytest.mark.parametrize(("after", "pairs"), [(30.0, 1), (60.0, 1), (62.0, 0)])
def test_a_take_within_the_attribution_makes_a_pair_without_any_correction(after: float, pairs: int) -> None:
    bare = LOG.model_copy(
        update={
            "attribution_seconds": 60.0,
            "correction_seconds": 0.0,
            "purchase_correction_seconds": 0.0,
            "correction_megabytes": 0.0,
        }
    )
    late = look("a", 50_000, "z", 7, "click", after=after, query_text="words")
    read = log_of([*searches(20), *late, *look("end", 90_000, "other", 3)])
    data = topic_pairs(read, features_of, CONFIG, name="t", log=bare)
    assert sum(pair.row.user_id == "z" for pair in data.pairs) == pairs
