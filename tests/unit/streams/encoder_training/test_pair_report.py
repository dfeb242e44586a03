"""Which items a held-back pair asks among, with which vectors, and which of them count as cold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from encoders.base import ItemContent
from encoders.fusion import Views
from streams.encoder_training.pair_report import ANCHORS, pair_report
from tests.factories.csft import features_of
from trainer.csft.pairs import AnchorKind, Pair
from trainer.samples.rows import Impression

ITEMS = 200
FEATURES = features_of([ItemContent(title=f"{n}", image=b"%d-" % n) for n in range(ITEMS)])


def pair(item: int, *anchor: int, history: tuple[int, ...] = (), kind: AnchorKind = AnchorKind.TRIGGER_ITEM) -> Pair:
    row = Impression("e", 0, item, item, f"u{item}", item, history, (0,) * len(history), False, False, label=1)
    return Pair(row, kind, anchor, ())


def trained(
    learned: list[Pair], held_back: list[Pair], views: Views, *, kind: str = "next", features: Any = FEATURES
) -> dict[str, Any]:
    found = pair_report(learned, held_back, ITEMS, features, views, anchor_view="fused")
    kinds = {kind} if kind == "next" else {kind, f"{kind}_at_1", f"{kind}_at_5"}
    assert all(found[vectors].keys() == kinds for vectors in ("frozen", "trained"))
    assert found["popularity"].keys() == {kind}
    return dict(found["trained"][kind])


def same(rows: torch.Tensor) -> Views:
    return Views(*[torch.cat([torch.zeros(1, rows.shape[1]), rows])] * 3)


def on_a_circle() -> Views:
    """Item n is nearest to n - 1 and n + 1, and farther from others the farther their numbers are apart."""
    at = torch.linspace(0, 3.0, ITEMS)
    return same(torch.stack([torch.cos(at), torch.sin(at)], dim=1))


def test_what_was_taken_before_is_no_answer() -> None:
    near = tuple(range(40, 161))
    asked = pair(170, 100, history=near)
    assert trained([], [asked], on_a_circle())["all"] == 1.0
    assert trained([], [pair(170, 100)], on_a_circle())["all"] == 0.0


def test_only_the_newest_items_of_an_anchor_ask() -> None:
    far, near = (190,) * 30, (20,) * ANCHORS
    assert trained([], [pair(21, *far, *near)], on_a_circle())["all"] == 1.0
    assert trained([], [pair(189, *far, *near)], on_a_circle())["all"] == 0.0


def test_items_that_nothing_was_learned_of_are_cold() -> None:
    found = trained([pair(n, 1) for n in range(1, 101)], [pair(50, 49), pair(150, 149), pair(151, 1)], on_a_circle())
    assert (found["questions"], found["cold_questions"], found["cold"]) == (3, 2, 0.5)


def test_a_query_asks_with_its_own_view_among_the_fused_vectors_of_items() -> None:
    eye = torch.eye(ITEMS)
    # a photo points at its item as that is fused; the item's own picture lies elsewhere
    image = torch.cat([torch.zeros(1, ITEMS), eye.roll(100, 0), eye])
    fused = torch.cat([torch.zeros(1, ITEMS), eye, eye.roll(50, 0)])
    views = Views(image, torch.zeros_like(image), fused)
    features = features_of([ItemContent(title=f"{n}", image=b"%d-" % n) for n in range(2 * ITEMS)])
    asking = [pair(n, ITEMS + n, kind=AnchorKind.QUERY_IMAGE) for n in range(1, ITEMS + 1)]
    assert trained([], asking, views, kind="query_image", features=features)["all"] == 1.0


def test_a_search_is_judged_by_its_first_answers_too() -> None:
    asking = [pair(n, ITEMS + n, kind=AnchorKind.QUERY_TEXT) for n in range(1, ITEMS + 1)]
    at = torch.linspace(0, 3.0, 2 * ITEMS)
    views = same(torch.stack([torch.cos(at), torch.sin(at)], dim=1))
    # words n lie as far beyond the last item as they are from item n: all are nearest to the last items
    features = features_of([ItemContent(title=f"{n}", image=b"%d-" % n) for n in range(2 * ITEMS)])
    found = pair_report([], asking, ITEMS, features, views, anchor_view="fused")["trained"]
    shares = {name: recall["all"] for name, recall in found.items()}
    assert shares == {"query_text": 50 / ITEMS, "query_text_at_1": 1 / ITEMS, "query_text_at_5": 5 / ITEMS}
    assert {name: recall["k"] for name, recall in found.items()} == {
        "query_text": 50, "query_text_at_1": 1, "query_text_at_5": 5,
    }  # fmt: skip


def test_popularity_is_that_of_what_was_learned_and_geometry_that_of_the_items() -> None:
    learned = [pair(n, 1) for n in range(1, 41) for _ in range(2)]
    views = on_a_circle()
    items = 150  # and fifty queries
    found = pair_report(learned, [pair(7, 120), pair(150, 149)], items, FEATURES, views, anchor_view="fused")
    assert found["popularity"]["next"]["all"] == 0.5
    rows = views.fused_ND[1 : items + 1].double().numpy()
    expected = ((rows @ rows.T).sum() - items) / (items * (items - 1))
    np.testing.assert_allclose(found["geometry"]["mean_pairwise_cosine"], expected, atol=1e-6)
