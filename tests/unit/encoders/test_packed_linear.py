"""Products with packed weights: those of F.linear, of the weights as they are now, and one row at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from encoders.arithmetic import ALIKE_ROWS
from encoders.bert import Bert
from encoders.bundle import DEFAULT_BUNDLE, read_bundle
from encoders.packed_linear import PackedLinear
from encoders.text import TextTower

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="this build of torch has no oneDNN",
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def is_packed(linear: PackedLinear, name: str) -> bool:
    return name in linear._packed


def test_it_is_the_product_of_the_weight_of_now() -> None:
    linear, inputs, bias = PackedLinear(), drawn(3, 5, 48), drawn(32, seed=1)
    for seed in (2, 3):  # another weight of the same name is packed anew
        weight = drawn(32, 48, seed=seed)
        found = linear("layer", inputs, weight, bias)
        torch.testing.assert_close(found, F.linear(inputs, weight, bias), rtol=1e-5, atol=1e-5)
        assert found.shape == (3, 5, 32) and is_packed(linear, "layer")
    transposed = drawn(48, 3).T
    expected = F.linear(transposed, weight, bias)
    torch.testing.assert_close(linear("layer", transposed, weight, bias), expected, rtol=1e-5, atol=1e-5)


def test_what_training_moves_and_other_precisions_are_not_packed() -> None:
    inputs, weight, bias = drawn(4, 8), drawn(8, 8, seed=1), drawn(8, seed=2)
    linear = PackedLinear()
    learned = torch.nn.Parameter(weight.clone())
    with torch.no_grad():  # a step changes it in place, between two passes
        linear("learned", inputs, learned, bias)
        learned.mul_(2)
        torch.testing.assert_close(linear("learned", inputs, learned, bias), F.linear(inputs, 2 * weight, bias))
    wanted = inputs.clone().requires_grad_()
    linear("input", wanted, weight, bias).sum().backward()
    assert wanted.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear("reduced", inputs, weight, bias).dtype is torch.bfloat16
    assert linear("double", inputs.double(), weight.double(), bias.double()).dtype is torch.float64
    assert not any(is_packed(linear, name) for name in ("learned", "input", "reduced", "double"))


def default_tower() -> TextTower:
    manifest, _ = read_bundle(DEFAULT_BUNDLE)
    return TextTower(manifest.text.weights.resolve(DEFAULT_BUNDLE), max_tokens=manifest.text.max_tokens)


def test_a_text_has_the_same_features_alone_as_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a build has no such kernels, or rounds few rows in another way: lone texts are repeated then."""
    packed = default_tower()
    monkeypatch.setattr(PackedLinear, "_pack", lambda self, name, weight: None)
    plain = default_tower()
    monkeypatch.setattr(Bert, "_is_alike_alone", lambda self: False)
    repeating = default_tower()
    assert repeating.model.alike_rows == ALIKE_ROWS
    texts = [" ".join(["red wool coat"] * words) + "s" * (words % 3) for words in range(1, 30)]
    tokens = [found for text in texts if (found := packed.tokenize(text))]
    towers = (packed, plain, repeating)
    together = [tower.features(tokens) for tower in towers]
    for tower, many in zip(towers, together, strict=True):
        assert all((tower.features([text])[0] == one).all() for text, one in zip(tokens, many, strict=True))
        torch.testing.assert_close(torch.from_numpy(many), torch.from_numpy(together[0]), rtol=1e-4, atol=1e-5)
