from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.factories.neural import Bag, random_world, world
from trainer.metrics import auc
from trainer.offline.neural.flip import Flip, FlipNetwork, TrainableBert, alignment, language_folder, noise_contrastive
from trainer.offline.neural.flip_rows import RECENT, Fields, TitleTokens, recent

FOLDER = language_folder()


@pytest.fixture
def flip() -> FlipNetwork:
    torch.manual_seed(0)
    return FlipNetwork((5, 4, 3), Bag()).eval()


@pytest.fixture(scope="module")
def known() -> TitleTokens:
    return TitleTokens.of(world([(1, [2])]).items.titles, FOLDER)


def test_a_row_is_written_as_target_and_latest_titles_without_gaps(known: TitleTokens) -> None:
    data = world([(4, [1, 2, 3, 5]), (6, []), (7, [2])])
    token_NW, value_NW = known.rows(data.rows.item_N, recent(data))
    assert known.lengths(data.rows.item_N, recent(data)).tolist() == (token_NW != known.padding).sum(1).tolist()
    title = [list(filter(None, known.title_IW[item])) for item in range(13)]
    expected = [known.first, *title[4]]
    for item in (5, 3, 2):  # newest first
        expected += [known.separator, *title[item]]
    assert token_NW[0].tolist() == expected
    assert token_NW[1].tolist()[: 1 + len(title[6])] == [known.first, *title[6]]
    assert (token_NW[1][1 + len(title[6]) :] == known.padding).all()
    assert value_NW[0].tolist().count(0) == len(title[4]) and value_NW[0].max() == RECENT
    assert (value_NW[token_NW == known.padding] == -1).all() and value_NW[0, 0] == -1


def test_numbers_become_bins_of_equal_share_and_similarities_are_left_out() -> None:
    data = random_world(500)
    fields = Fields.of(data, ("takes",))
    codes = fields.codes(data)
    assert codes.shape == (500, 2 + RECENT + 2) and len(fields.sizes) == codes.shape[1]
    assert (codes < np.array(fields.sizes)).all() and (codes >= 0).all()
    counts = np.bincount(codes[:, 2 + RECENT])
    assert len(counts) == 10 and counts.min() >= 40
    assert codes[:, 0].tolist() == data.rows.item_N.tolist()


def test_padding_of_text_changes_nothing(flip: FlipNetwork, known: TitleTokens) -> None:
    token_NW, _ = known.rows(np.array([4, 6]), np.array([[1, 2, 3], [0, 0, 0]]))
    tokens, codes = torch.from_numpy(token_NW), torch.tensor([[1, 2, 0], [3, 1, 2]])
    wider = nn.functional.pad(tokens, (0, 5), value=known.padding)
    with torch.no_grad():
        found = flip.logits(tokens, codes, known.padding)
        np.testing.assert_allclose(flip.logits(wider, codes, known.padding).numpy(), found.numpy(), atol=1e-5)
        alone = flip.logits(tokens[1:, : int((tokens[1] != known.padding).sum())], codes[1:], known.padding)
        np.testing.assert_allclose(alone.numpy(), found[1:].numpy(), atol=1e-5)


def test_a_masked_field_is_not_seen_and_its_neighbours_are(flip: FlipNetwork) -> None:
    hidden = torch.tensor([[False, True, False]])
    states = [flip.tabular_vector(torch.tensor([code]), hidden) for code in ([1, 2, 0], [1, 3, 0], [2, 2, 0])]
    assert torch.equal(states[0], states[1]) and not torch.allclose(states[0], states[2])


def test_noise_contrastive_matches_loops() -> None:
    rng = np.random.default_rng(0)
    score, log_q = rng.normal(size=(3, 6)), np.log(rng.uniform(0.01, 0.3, size=(3, 6)))
    total = 0.0
    for m in range(3):
        for k in range(6):
            told_apart = 1 / (1 + math.exp(-(score[m, k] - log_q[m, k] - math.log(5))))
            total -= math.log(told_apart if k == 0 else 1 - told_apart)
    found = noise_contrastive(torch.from_numpy(score), torch.from_numpy(log_q))
    assert float(found) == pytest.approx(total / 3)


def test_alignment_matches_loops_and_knows_its_own() -> None:
    rng = np.random.default_rng(1)
    text, tabular = rng.normal(size=(4, 5)), rng.normal(size=(4, 5))
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in tabular] for a in text]) / 0.7
    total = 0.0
    for b in range(4):
        total -= cosine[b, b] - math.log(sum(math.exp(x) for x in cosine[b]))
        total -= cosine[b, b] - math.log(sum(math.exp(x) for x in cosine[:, b]))
    found = float(alignment(torch.from_numpy(text), torch.from_numpy(tabular)))
    assert found == pytest.approx(total / 8)
    assert float(alignment(torch.from_numpy(text), torch.from_numpy(text))) < found


def test_restoring_text_sees_the_table_and_restoring_fields_sees_the_text(
    flip: FlipNetwork, known: TitleTokens
) -> None:
    token_NW, value_NW = known.rows(np.array([4, 6]), np.array([[1, 2, 3], [5, 0, 0]]))
    tokens, codes = torch.from_numpy(token_NW), torch.tensor([[1, 2, 0], [3, 1, 2]])
    nothing_W, nothing_F = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(codes, dtype=torch.bool)
    noise, log_q = torch.zeros(2, 3, 4, dtype=torch.int64), torch.zeros(2, 3)

    def loss(hidden_W: Tensor, hidden_F: Tensor, seen: Tensor = tokens, code: Tensor = codes) -> Tensor:
        return flip.pretraining_loss(seen, code, hidden_W, hidden_F, noise, log_q, torch.zeros(2, 3, 4), known)

    text = torch.from_numpy(value_NW == 0)
    base = loss(nothing_W, nothing_F)
    flip.zero_grad()
    (loss(text, nothing_F) - base).backward()
    assert flip.tabular[1].weight.grad.abs().sum() > 0, "the tabular vector takes part in restoring text"
    flip.zero_grad()
    (loss(nothing_W, nothing_F | True) - loss(nothing_W, nothing_F)).backward()
    assert flip.language.words.grad.abs().sum() > 0, "the text vector takes part in restoring fields"


def test_the_joint_logit_starts_as_the_text_model_and_shares_by_a(flip: FlipNetwork, known: TitleTokens) -> None:
    tokens, codes = torch.from_numpy(known.rows(np.array([4]), np.array([[1, 2, 3]]))[0]), torch.tensor([[1, 2, 0]])
    joint, by_id, by_text = flip.logits(tokens, codes, known.padding)[0].tolist()
    assert joint == pytest.approx(by_text) and by_id != pytest.approx(by_text)
    with torch.no_grad():
        flip.share.fill_(0.25)
    assert flip.logits(tokens, codes, known.padding)[0, 0].item() == pytest.approx(0.25 * by_id + 0.75 * by_text)


def fitted(rows: int) -> Flip:
    model = Flip(language=Bag(), folder=FOLDER)
    model.batch_rows, model.learning_rate = 32, 1e-2
    model.fit(random_world(rows), None, seed=3, trial={})
    return model


def test_flip_learns_and_scores() -> None:
    train, model = random_world(600), fitted(600)
    scores = model.predict(train)
    assert scores.shape == (600,) and (scores > 0).all() and (scores < 1).all()
    assert auc(train.rows.label_N.astype(np.int64), scores) > 0.6


def test_flip_repeats_itself() -> None:
    test = random_world(20, seed=5)
    np.testing.assert_array_equal(fitted(64).predict(test), fitted(64).predict(test))


def test_the_language_model_is_the_bundles_and_learns() -> None:
    bert = TrainableBert(FOLDER)
    tokens = torch.tensor([[101, 2417, 3797, 102]])
    bert(tokens, torch.ones_like(tokens)).sum().backward()
    assert bert.words.grad is not None and bert.width == bert.words.shape[1] == 384
    assert sum(parameter.grad is not None for parameter in bert.parameters()) > 90
