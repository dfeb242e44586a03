"""Health of a space against counting by hand, and what counts as collapse."""

import numpy as np
import pytest

from trainer.csft import health


def questions(anchors, targets, known):
    return health.Questions(
        np.array(anchors), np.array(targets), np.concatenate([[0], np.cumsum([len(k) for k in known])]).astype(int),
        np.array([item for items in known for item in items], int),
    )  # fmt: skip


def unit(n, d, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_recall_matches_counting_by_hand():
    rng = np.random.default_rng(0)
    vectors = np.concatenate([np.zeros((1, 8), np.float32), unit(40, 8)])
    cold = np.zeros(41, bool)
    cold[[3, 7, 11, 15, 19, 23, 27]] = True
    targets = rng.integers(1, 41, 60)
    anchors = rng.integers(1, 41, (60, 2))
    known = [sorted(set(map(int, row)) - {int(target)}) for row, target in zip(anchors, targets, strict=True)]
    asked = questions(anchors, targets, known)
    found = health.recall_at_k(health.queries(vectors, asked), vectors, asked, cold, k=5)
    hits, cold_hits, among = [], [], []
    for row, target, out in zip(anchors, targets, known, strict=True):
        query = vectors[row].sum(0)
        scores = {item: float(query @ vectors[item]) for item in range(1, 41) if item not in out}
        ranked = sorted(scores, key=scores.get, reverse=True)
        hits.append(target in ranked[:5])
        if cold[target]:
            cold_hits.append(target in ranked[:5])
            among.append(target in [item for item in ranked if cold[item]][:5])
    assert found.all == pytest.approx(np.mean(hits))
    assert found.cold == pytest.approx(np.mean(cold_hits))
    assert found.cold_among_cold == pytest.approx(np.mean(among))
    assert (found.questions, found.cold_questions) == (60, len(among))


def test_ties_never_look_like_hits():
    vectors = np.concatenate([np.zeros((1, 4), np.float32), np.tile(unit(1, 4), (200, 1))])
    asked = questions([[1]] * 20, list(range(2, 22)), [[1]] * 20)
    found = health.recall_at_k(health.queries(vectors, asked), vectors, asked, np.zeros(201, bool), k=50)
    assert found.all == 0.0 and found.cold is None


def test_popularity_ranks_by_takes():
    takes = np.array([0, 5, 9, 1, 7])
    asked = questions([[1], [1]], [2, 3], [[1], [1]])
    assert health.popularity_recall(takes, asked, np.zeros(5, bool), k=1).all == 0.5


def test_a_sample_of_questions_keeps_each_ones_known_items():
    asked = questions([[i] for i in range(1, 31)], range(1, 31), [list(range(1, i % 4 + 1)) for i in range(30)])
    few = asked.sample(10, seed=3)
    assert len(few) == 10
    for q in range(10):
        original = int(few.anchors_QL[q, 0]) - 1
        known = few.known[few.known_start_Q[q] : few.known_start_Q[q + 1]]
        assert known.tolist() == list(range(1, original % 4 + 1))


def test_geometry_of_known_spaces():
    even = health.geometry(np.concatenate([np.eye(16), -np.eye(16)]).astype(np.float32))
    assert even.mean_pairwise_cosine == pytest.approx(-1 / 31, abs=1e-6)
    assert even.effective_rank == pytest.approx(16, rel=1e-3)
    one = health.geometry(np.tile(unit(1, 16), (50, 1)))
    assert one.mean_pairwise_cosine == pytest.approx(1.0, abs=1e-5)
    assert one.uniformity == pytest.approx(0.0, abs=1e-5)
    assert even.uniformity < one.uniformity


def test_titles_find_their_own_picture_and_no_other():
    rows = unit(200, 32)
    assert health.geometry(rows, title_ND=rows, image_ND=rows).title_finds_image == 1.0
    assert health.geometry(rows, title_ND=rows, image_ND=unit(200, 32, 9)).title_finds_image < 0.2
    assert health.geometry(rows, title_ND=rows, image_ND=np.zeros_like(rows)).title_finds_image is None


def test_collapse_is_seen_in_the_cosine_and_in_the_loss_and_in_nothing_else():
    healthy = health.geometry(unit(100, 16))
    limits = {"cosine_limit": 0.5, "loss_limit": 0.98}
    assert health.collapse(healthy, loss_share=0.6, **limits) is None
    assert health.collapse(healthy, loss_share=None, **limits) is None
    assert "told apart" in health.collapse(healthy, loss_share=1.0, **limits)
    assert "told apart" in health.collapse(healthy, loss_share=float("nan"), **limits)
    flat = health.geometry(np.tile(unit(1, 16), (50, 1)))
    assert "alike" in health.collapse(flat, loss_share=0.1, **limits)


def test_popularity_at_retrieval_gives_back_what_the_correction_took_out():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((6, 4)).astype(np.float32)
    queries = vectors[1:3]
    takes = np.array([0, 100, 10, 1, 0, 5])
    rows, columns = health.with_popularity(queries, vectors, takes, temperature=0.2, strength=0.25)
    one = 0.1 * 116 / 4
    for q in range(2):
        for n in range(6):
            expected = queries[q] @ vectors[n] / 0.2 + 0.75 * np.log((takes[n] + one) / (116 + one))
            assert rows[q] @ columns[n] == pytest.approx(expected, rel=1e-5)
    fully, untouched = health.with_popularity(queries, vectors, takes, temperature=0.2, strength=1.0)
    np.testing.assert_allclose(fully @ untouched.T, queries @ vectors.T / 0.2, rtol=1e-5)


def test_earlier_anchors_weigh_less_by_the_decay_and_padding_nothing():
    vectors = np.concatenate([np.full((1, 4), 9.0, np.float32), unit(3, 4)])
    asked = questions([[1, 2, 3], [2, 0, 0]], [3, 3], [[], []])
    found = health.queries(vectors, asked, decay=0.5)
    summed = vectors[1] + 0.5 * vectors[2] + 0.25 * vectors[3]
    np.testing.assert_allclose(found, [summed / np.linalg.norm(summed), vectors[2]], rtol=1e-5)


def test_alignment_is_the_mean_squared_distance_of_query_and_answer():
    one, other = unit(30, 8, 1), unit(30, 8, 2)
    expected = np.mean([np.sum((a - b) ** 2) for a, b in zip(one, other, strict=True)])
    assert health.geometry(one, query_QD=one, answer_QD=other).alignment == pytest.approx(expected, rel=1e-5)
    assert health.geometry(one, query_QD=one[:0], answer_QD=other[:0]).alignment is None


@pytest.mark.parametrize(("items", "told"), [(20, True), (19, False)])
def test_titles_are_matched_from_twenty_items_with_both_on_and_the_tenth_nearest_counts(items, told):
    rows = np.eye(24, dtype=np.float32)[:items]
    far = np.concatenate([rows, np.zeros((4, 24), np.float32)])
    found = health.geometry(unit(items + 4, 24), title_ND=far, image_ND=far).title_finds_image
    assert found == (1.0 if told else None)
    titles = rows.copy()
    titles[0], titles[1] = rows[0] + 2 * rows[1:10].sum(0), rows[1] + 2 * rows[2:12].sum(0)
    if told:  # nine pictures are nearer to the first title than its own, ten to the second
        assert health.geometry(rows, title_ND=titles, image_ND=rows).title_finds_image == 0.95


def test_a_space_at_its_limits_has_not_collapsed():
    shape = health.Geometry(0.5, 4.0, -1.0, None, None)
    assert health.collapse(shape, loss_share=0.98, cosine_limit=0.5, loss_limit=0.98) is None
    assert health.collapse(shape, loss_share=0.99, cosine_limit=0.5, loss_limit=0.98) is not None
    assert health.collapse(shape, loss_share=0.5, cosine_limit=0.49, loss_limit=0.98) is not None


def test_anchors_are_padded_to_the_width_asked_for_and_a_sample_stays_in_order():
    asked = health.Questions.of([([n], n, {n}) for n in range(1, 31)], width=4)
    assert asked.anchors_QL.shape == (30, 4) and not asked.anchors_QL[:, 1:].any()
    few = asked.sample(10, seed=3)
    assert (
        few.target_Q.tolist() == sorted(few.target_Q.tolist()) and few.anchors_QL[:, 0].tolist() == few.known.tolist()
    )


def test_neither_padding_nor_the_answer_itself_stands_before_the_answer():
    vectors = np.array([[0, 0], [1, 0], [-0.5, 0], [-0.5, 0], [-1, 0]], np.float32)
    asked = health.Questions.of([([1], 2, {1})])
    cold = np.array([True, False, True, False, False])  # whatever is said of padding
    found = health.recall_at_k(health.queries(vectors, asked), vectors, asked, cold, k=1)
    assert (found.all, found.cold, found.cold_among_cold) == (1.0, 1.0, 1.0), "one other is as near"


def test_without_any_take_all_are_equally_popular():
    _, columns = health.with_popularity(unit(1, 4), unit(5, 4), np.zeros(5, int), temperature=1.0, strength=0.0)
    assert np.isfinite(columns).all() and len(set(columns[:, -1].tolist())) == 1


def test_one_item_has_one_direction_and_uniformity_is_of_half_the_squared_distances_of_pairs():
    alone = health.geometry(unit(1, 4))
    assert (alone.mean_pairwise_cosine, alone.effective_rank) == (pytest.approx(0, abs=1e-6), 1.0)
    corner = 0.5**0.5
    two = health.geometry(np.array([[corner, 0], [0, corner]], np.float32))  # a pair is of two or of one twice
    assert two.uniformity == pytest.approx(np.log((1 + np.exp(-2)) / 2), abs=0.01)
