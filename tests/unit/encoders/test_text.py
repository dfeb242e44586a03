"""The text tower gives what transformers would, in any grouping."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from encoders.bundle import DEFAULT_BUNDLE, read_bundle
from encoders.config import Precision
from encoders.text import TextTower, by_length, longest_text
from schemas.errors import Misconfigured
from tests.factories.small_models import write_bert

TEXTS = ["wool coat", "x", "", "Ünïcödé 漢字 🎉", "coat " * 300, "The Last Garden. Drama", "silk dress with a tie belt"]


def reference(folder: Path, texts: list[str], max_tokens: int) -> np.ndarray:
    from transformers import AutoModel, AutoTokenizer  # takes seconds

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:  # one by one: no padding to get wrong
        tokens = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state
        rows.append(hidden[0].mean(0).numpy())
    return np.stack(rows)


def assert_as_transformers(folder: Path, max_tokens: int, *, atol: float) -> None:
    tower = TextTower(folder, max_tokens=max_tokens)
    texts = [text for text in TEXTS if text]
    found = tower.features([tokens for text in texts if (tokens := tower.tokenize(text)) is not None])
    np.testing.assert_allclose(found, reference(folder, texts, max_tokens), atol=atol)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder, num_hidden_layers=3, intermediate_size=64, layer_norm_eps=1e-6)
    return folder


def test_bert_on_plain_torch_is_transformers_bert(tiny_bert: Path) -> None:
    assert_as_transformers(tiny_bert, 32, atol=2e-6)


def test_the_default_text_model_is_transformers_own_answer() -> None:
    manifest, _ = read_bundle(DEFAULT_BUNDLE)
    assert_as_transformers(manifest.text.weights.resolve(DEFAULT_BUNDLE), manifest.text.max_tokens, atol=2e-5)


def test_a_text_without_tokens_is_no_text(tiny_bert: Path) -> None:
    tower = TextTower(tiny_bert, max_tokens=32)
    assert tower.tokenize("") is None
    assert tower.tokenize(" \u3000 ") is None
    assert tower.tokenize("unheardof") is not None  # an unknown word is still a word


def test_long_texts_are_cut_with_their_end_mark_kept(tiny_bert: Path) -> None:
    tokens = TextTower(tiny_bert, max_tokens=16).tokenize("coat " * 100)
    assert tokens is not None
    assert (len(tokens), tokens[0], tokens[-1]) == (16, 2, 3)


def test_a_thousand_texts_of_all_lengths_come_back_in_order(tiny_bert: Path) -> None:
    tower = TextTower(tiny_bert, max_tokens=64)
    rng = np.random.default_rng(0)
    texts = [(2, *rng.integers(5, 30, length).tolist(), 3) for length in rng.integers(1, 60, 1000)]
    together = tower.features(texts)
    for row in (0, 17, 500, 999):
        np.testing.assert_allclose(tower.features([texts[row]])[0], together[row], atol=1e-5)


@pytest.fixture
def own_bert(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "bert"))


def test_weights_with_a_tensor_missing_are_refused_at_start(own_bert: Path) -> None:
    weights = load_file(own_bert / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, own_bert / "model.safetensors")
    with pytest.raises(Misconfigured, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        TextTower(own_bert, max_tokens=32)


def test_a_bundle_that_asks_for_more_tokens_than_the_model_reads_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(Misconfigured, match="64"):
        TextTower(tiny_bert, max_tokens=128)


def test_a_damaged_tokenizer_is_refused_at_start(own_bert: Path) -> None:
    (own_bert / "tokenizer.json").write_text('{"version": 1')
    with pytest.raises(Misconfigured, match="tokenizer"):
        TextTower(own_bert, max_tokens=32)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_stays_near_full_precision(tiny_bert: Path, precision: Precision) -> None:
    texts = [tuple(range(5, 5 + n)) for n in (3, 9, 4, 20)]
    full = TextTower(tiny_bert, max_tokens=32).features(texts)
    reduced = TextTower(tiny_bert, max_tokens=32, precision=precision).features(texts)
    cosines = (full * reduced).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(reduced, axis=1)
    assert cosines.min() > 0.999
    assert not np.array_equal(full, reduced)


def test_a_text_beyond_the_bound_of_a_pass_goes_alone_and_all_others_within_it() -> None:
    """4,096 padded tokens bound a pass; one longer text still has to go through."""
    lengths = [5_000, 10, 4_096, 2_048, 2_048, 2_049, 6_000]
    for alike in (False, True):
        groups = list(by_length(lengths, alike=alike))
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        for group in groups:
            longest = max(lengths[row] for row in group)
            assert len(group) == 1 or len(group) * longest <= 4_096
    assert [3, 4] in list(by_length(lengths, alike=True))


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "clip", "text_config": {"max_position_embeddings": 77}}, 77),
        ({"model_type": "t5"}, 1 << 20),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": None}, 513),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 3}, 510),
    ],
)
def test_what_a_model_reads_is_told_by_its_configuration(tmp_path: Path, config: dict[str, Any], longest: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert longest_text(tmp_path) == longest


@pytest.mark.parametrize("text", ["[]", "{", '{"max_position_embeddings": "many"}'])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Misconfigured, match=str(tmp_path)):
        longest_text(tmp_path)


def test_weights_in_several_files_with_a_prefix_are_the_same_model(tiny_bert: Path, own_bert: Path) -> None:
    weights = {f"bert.{name}": value for name, value in load_file(own_bert / "model.safetensors").items()}
    (own_bert / "model.safetensors").unlink()
    for part, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        save_file({name: weights[name] for name in names}, own_bert / f"model-{part}.safetensors")
    texts = [(2, 7, 8, 3), (2, 9, 3)]
    found, same = (TextTower(folder, max_tokens=32).features(texts) for folder in (own_bert, tiny_bert))
    np.testing.assert_array_equal(found, same)


def test_weights_are_replaced_by_name_and_shape_or_not_at_all(tiny_bert: Path) -> None:
    tower, name = TextTower(tiny_bert, max_tokens=32), "encoder.layer.2.output.dense.bias"
    before = tower.features([(2, 7, 3)])
    for wrong in ({"no.such": torch.zeros(1)}, {name: torch.zeros(1)}):
        with pytest.raises(ValueError, match="is no weight of this tower"):
            tower.load(wrong)
    np.testing.assert_array_equal(tower.features([(2, 7, 3)]), before)
    tower.load({name: torch.arange(48.0)})
    assert not np.allclose(tower.features([(2, 7, 3)]), before, atol=1e-2)


def test_a_text_as_long_as_the_model_reads_is_not_padded_beyond_it(tmp_path: Path) -> None:
    write_bert(tmp_path, num_hidden_layers=1, intermediate_size=16, max_position_embeddings=60)
    tower = TextTower(tmp_path, max_tokens=60)
    texts = [(2, *[7] * length, 3) for length in (58, 57, 1)]
    found = tower.features(texts)
    assert np.isfinite(found).all() and tower.features([]).shape == (0, 48)
    np.testing.assert_array_equal(found[1], tower.features([texts[1]])[0])


def test_a_vocabulary_is_its_whole_words_in_alphabetical_order() -> None:
    known = {"▁wool": 0, "Ġcoat": 1, "coat": 2, "##ing": 3, "[PAD]": 4, "of": 5, "été": 6, "abc1": 7, "Dress": 8}
    tower: Any = SimpleNamespace(_tokenizer=SimpleNamespace(get_vocab=lambda: known))
    assert TextTower.vocabulary(tower) == ["Dress", "coat", "wool"]


def test_a_folder_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=str(tmp_path)):
        longest_text(tmp_path)
