"""What FLIP is trained on: the loss of pre-training as in loops, and what is masked, drawn and learned how fast."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.factories.neural import Bag, random_world, world
from trainer.networks.losses import NonFiniteLoss
from trainer.offline.neural import flip
from trainer.offline.neural.flip import FIELD_WIDTH, Flip, FlipNetwork, TrainableBert, alignment, language_folder
from trainer.offline.neural.flip_rows import RECENT, TARGET_TOKENS, Fields, TitleTokens, recent

FOLDER = language_folder()


@pytest.fixture
def network() -> FlipNetwork:
    torch.manual_seed(0)
    return FlipNetwork((5, 4, 3), Bag()).eval()


@pytest.fixture(scope="module")
def known() -> TitleTokens:
    return TitleTokens.of(world([(1, [2])]).items.titles, FOLDER)


def test_a_masked_field_reads_the_last_row_of_its_own_part_of_the_table(network: FlipNetwork) -> None:
    hidden = torch.tensor([[False, True, False], [True, False, True]])
    found = network.tabular_vector(torch.tensor([[1, 2, 0], [4, 3, 1]]), hidden)
    # the fields have 5, 4 and 3 values and one more each: their parts begin at 0, 6 and 11
    expected = network.tabular(network.fields(torch.tensor([[1, 10, 11], [5, 9, 14]])).flatten(1))
    torch.testing.assert_close(found, expected)


def test_pretraining_restores_text_beside_the_table_and_fields_beside_the_text_as_in_loops(
    network: FlipNetwork, known: TitleTokens
) -> None:
    token_NW, _ = known.rows(np.array([4, 6]), np.array([[1, 2, 3], [5, 0, 0]]))
    tokens, codes = torch.from_numpy(token_NW), torch.tensor([[1, 2, 0], [3, 1, 2]])
    hidden_W, hidden_F = (
        torch.zeros_like(tokens, dtype=torch.bool),
        torch.tensor([[True, False, True], [False, True, True]]),
    )
    hidden_W[0, 2:4] = hidden_W[1, 1] = True
    torch.manual_seed(3)
    noise = torch.randint(0, 3, (2, 3, 4))
    log_q, log_q_noise = -torch.rand(2, 3) - 1, -torch.rand(2, 3, 4) - 1
    with torch.no_grad():
        found = network.pretraining_loss(tokens, codes, hidden_W, hidden_F, noise, log_q, log_q_noise, known)
        _, text = network.states(tokens, known.padding)
        table, masked = network.tabular_vector(codes), network.tabular_vector(codes, hidden_F)
        gapped, _ = network.states(torch.where(hidden_W, known.mask, tokens), known.padding)
        words, fields, first = [], [], (0, 6, 11)
        for b, w in hidden_W.nonzero().tolist():
            scores = network.language.words @ network.restore_text(torch.cat([gapped[b, w], table[b]]))
            words.append(float(scores.logsumexp(0) - scores[tokens[b, w]]))
        for b, f in hidden_F.nonzero().tolist():
            wanted = network.restore_fields(torch.cat([masked[b], text[b]])).view(3, FIELD_WIDTH)[f]
            true = wanted @ network.fields.weight[first[f] + codes[b, f]] - log_q[b, f] - math.log(4)
            others = network.fields.weight[first[f] + noise[b, f]] @ wanted - log_q_noise[b, f] - math.log(4)
            fields.append(float(F.softplus(-true) + F.softplus(others).sum()))
        sides = float(alignment(network.text_side(text), network.tabular_side(table)))
    assert float(found) == pytest.approx(sides + np.mean(words) + np.mean(fields), rel=1e-4)


# ---- what a fit asks for ---------------------------------------------------------------------------------------------


def fitted(data: Any, *, language: nn.Module | None = None, **more: float) -> Flip:
    model = Flip(language=language or Bag(), folder=FOLDER)  # type: ignore[arg-type]
    model.batch_rows, model.learning_rate = 32, 1e-2
    for name, value in more.items():
        setattr(model, name, value)
    model.fit(data, None, seed=3, trial={})
    return model


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each step of pre-training."""
    seen: list[tuple[Any, ...]] = []
    own = FlipNetwork.pretraining_loss

    def noted(self: FlipNetwork, *given: Any) -> Tensor:
        seen.append(given)
        return own(self, *given)

    monkeypatch.setattr(FlipNetwork, "pretraining_loss", noted)
    return seen


def test_whole_titles_are_masked_and_special_tokens_never(asked: list[tuple[Any, ...]]) -> None:
    data = random_world(300)
    model = fitted(data)
    ends = (model.words.first, model.words.separator, model.words.padding)
    hidden_of_last = 0
    for tokens, _, hidden, *_ in asked:
        assert not hidden[(tokens[..., None] == torch.tensor(ends)).any(-1)].any()
        for row, masked in zip(tokens.tolist(), hidden.tolist(), strict=True):
            cuts = [0, *(n for n, token in enumerate(row) if token == model.words.separator), len(row)]
            values = [set(masked[a + 1 : b]) for a, b in pairwise(cuts)]
            # behind the last title there is padding, which is not masked
            assert all(len(value) == 1 for value in values[:-1])
            hidden_of_last += len(values) == 1 + RECENT and True in values[-1]
    share = np.mean([hidden[:, 1].float().mean() for _, _, hidden, *_ in asked])
    assert 0.1 < share < 0.2 and hidden_of_last > 5
    assert 0.1 < np.mean([hidden.float().mean() for _, _, _, hidden, *_ in asked]) < 0.2


def test_noise_is_drawn_from_all_rows_and_corrected_by_the_frequency_in_its_field(asked: list[tuple[Any, ...]]) -> None:
    data = random_world(60)
    model = fitted(data, batch_rows=4)
    codes = model.fields.codes(data)
    beyond = 0
    for _, code, _, _, noise, log_q, log_q_noise, _ in asked:
        for f in range(codes.shape[1]):
            share = {value: math.log((codes[:, f] == value).mean()) for value in set(codes[:, f].tolist())}
            assert log_q[:, f].tolist() == pytest.approx([share[value] for value in code[:, f].tolist()])
            drawn = noise[:, f].flatten().tolist()
            assert log_q_noise[:, f].flatten().tolist() == pytest.approx([share[value] for value in drawn])
            beyond += bool(set(drawn) - set(code[:, f].tolist()))
    assert beyond > 60


def test_similarities_are_no_fields() -> None:
    rows = [(n % 12 + 1, [n % 5 + 1]) for n in range(20)]
    model = fitted(world(rows, labels=[n % 2 for n in range(20)], names=("takes", "cosine mean", "has vector")))
    assert len(model.fields.sizes) == 2 + RECENT + 2, "takes, and the price of the target"


def test_batches_of_like_length_come_in_random_order(asked: list[tuple[Any, ...]]) -> None:
    fitted(random_world(300), batch_rows=16)
    widths = [tokens.shape[1] for tokens, *_ in asked]
    assert len(set(widths)) > 2 and widths != sorted(widths)
    shorts = [(tokens != 0).sum(1).tolist() for tokens, *_ in asked if tokens.shape[1] == min(widths)]
    assert all(len(set(one)) <= 2 for one in shorts)


def test_only_the_newest_rows_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_world(100)
    alone = fitted(data.select(np.arange(60, 100))).predict(data)
    monkeypatch.setattr(flip, "ROWS", 40)
    np.testing.assert_array_equal(fitted(data).predict(data), alone)


def test_the_language_model_has_a_step_size_of_its_own() -> None:
    data, before = random_world(40), Bag().words.detach()
    still, moved = (fitted(data, language_rate=rate).network for rate in (1e-12, 1e-2))
    torch.testing.assert_close(still.language.words.detach(), before, rtol=0, atol=1e-6)
    assert (moved.language.words.detach() - before).abs().max() > 1e-3
    assert not torch.equal(still.fields.weight, FlipNetwork((5,), Bag()).fields.weight[:1])


def test_fewer_rows_than_a_batch_are_one_and_scores_are_of_the_joint_logit() -> None:
    data = random_world(20)
    model = fitted(data)
    with torch.no_grad():
        model.network.share.fill_(0.3)
        tokens, _ = model.words.rows(data.rows.item_N, recent(data))
        codes = torch.from_numpy(model.fields.codes(data))
        logits = model.network.logits(torch.from_numpy(tokens), codes, model.words.padding)
    np.testing.assert_allclose(model.predict(data), torch.sigmoid(logits[:, 0].double()).numpy(), rtol=1e-5)


def test_gradients_are_no_longer_than_one() -> None:
    language = Bag()
    with torch.no_grad():
        language.words *= 300
    network = fitted(random_world(20), language=language).network
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    assert torch.stack(norms).norm() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("batches", [1, 9, 10, 11])
def test_any_number_of_batches_is_learned_from(batches: int, asked: list[tuple[Any, ...]]) -> None:
    fitted(random_world(2 * batches), batch_rows=2)
    assert len(asked) == batches


def test_a_loss_that_is_no_number_ends_the_fit() -> None:
    language = Bag()
    with torch.no_grad():
        language.words.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="loss is nan"):
        fitted(random_world(20), language=language)


def test_all_weights_of_the_language_model_are_learned() -> None:
    bert = TrainableBert(FOLDER)
    tokens = torch.tensor([[101, 2417, 3797, 102]])
    bert(tokens, torch.ones_like(tokens)).sum().backward()
    assert all(parameter.grad is not None for parameter in bert.parameters())


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_long_title_is_cut() -> None:
    long, short = "red " * (TARGET_TOKENS + 5), "red"
    found = TitleTokens.of(["", long, short], FOLDER).title_IW
    assert (found != 0).sum(1).tolist() == [0, TARGET_TOKENS, 1] and len(set(found[1])) == 1


def test_a_number_at_an_edge_is_in_the_bin_above() -> None:
    data = world([(1, [2])] * 11, names=("takes", "age"))
    data.rows.dense_NF[:, 1] = np.arange(11)  # the inner tenths end at 1, 2, ... 9
    assert Fields.of(data, ("takes", "target ")).codes(data)[:, -1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]


def test_latest_items_are_padded_at_their_end() -> None:
    assert recent(world([(1, [2]), (3, [])])).tolist() == [[2, 0, 0], [0, 0, 0]]
    assert recent(world([(1, [2, 4, 5, 6])])).tolist() == [[6, 5, 4]]
