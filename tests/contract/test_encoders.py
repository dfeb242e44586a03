"""What every encoder promises, over the hashing one and the real default one."""

from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from encoders.base import Encoder, ItemContent
from encoders.config import EncoderConfig
from encoders.hashing import HashingEncoder
from encoders.loading import load_encoder
from schemas.errors import EncodingFailed, Reason


def picture(seed: int, *, size: tuple[int, int] = (120, 180)) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(int(c) for c in rng.integers(0, 255, 3)))
    box = (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2)
    ImageDraw.Draw(image).ellipse(box, fill=tuple(int(c) for c in rng.integers(0, 255, 3)))
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


ITEMS = [
    ItemContent(item_id="1", title="Linen dress and belt", category="Dress", text="Long sleeves.", image=picture(1)),
    ItemContent(item_id="2", title="Cordless drill", text="18 V, with two batteries. " * 40, image=picture(2)),
    ItemContent(item_id="3", title="The Last Garden", category="Drama"),
    ItemContent(item_id="4", image=picture(4)),
    ItemContent(item_id="5", title="Ünïcödé 漢字 🎉", price=3.5, image=picture(5, size=(1, 900))),
    ItemContent(item_id="6", title="x"),
]


def encode(encoder: Encoder, *items: ItemContent) -> NDArray[np.float32]:
    return encoder.encode([encoder.prepare(item) for item in items])


class EncoderContract:
    @classmethod
    def make(cls) -> Encoder:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def encoder(cls) -> Encoder:
        return cls.make()

    def test_rows_are_finite_float32_of_length_one(self, encoder: Encoder) -> None:
        vectors = encode(encoder, *ITEMS)
        assert vectors.shape == (len(ITEMS), encoder.dim)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)

    def test_an_item_comes_out_the_same_alone_and_in_any_batch(self, encoder: Encoder) -> None:
        prepared = [encoder.prepare(item) for item in ITEMS]
        together = encoder.encode(prepared)
        alone = np.concatenate([encoder.encode([one]) for one in prepared])
        backwards = encoder.encode((prepared * 3)[::-1])[::-1][: len(ITEMS)]
        np.testing.assert_array_equal(alone, together)  # to the last bit: so that models are, too
        np.testing.assert_array_equal(backwards, together)

    def test_different_items_differ(self, encoder: Encoder) -> None:
        vectors = encode(encoder, *ITEMS)
        cosines = vectors @ vectors.T
        assert (cosines[~np.eye(len(ITEMS), dtype=bool)] < 0.999).all()

    def test_an_empty_batch_is_an_empty_matrix(self, encoder: Encoder) -> None:
        assert encoder.encode([]).shape == (0, encoder.dim)

    def test_encoding_leaves_its_input_as_it_was(self, encoder: Encoder) -> None:
        prepared = [encoder.prepare(item) for item in ITEMS]
        before = [(item.tokens, None if item.pixels is None else item.pixels.copy()) for item in prepared]
        encoder.encode(prepared)
        for item, (tokens, pixels) in zip(prepared, before, strict=True):
            assert item.tokens == tokens
            assert (item.pixels is None) == (pixels is None)
            if pixels is not None:
                np.testing.assert_array_equal(item.pixels, pixels)

    def test_prepared_items_say_which_modalities_they_have(self, encoder: Encoder) -> None:
        found = [(item.has_title, item.has_image) for item in map(encoder.prepare, ITEMS)]
        assert found == [(True, True), (True, True), (True, False), (False, True), (True, True), (True, False)]

    def test_a_missing_picture_leaves_the_text_alone_and_never_a_zero_vector(self, encoder: Encoder) -> None:
        whole = ITEMS[0]
        text_alone = ItemContent(title=whole.title, category="Dress", text=whole.text)
        both, text, image = encode(encoder, whole, text_alone, ItemContent(image=whole.image))
        # the full vector lies between its two parts, nearer to each than they are to one another
        assert both @ text > text @ image
        assert both @ image > text @ image
        np.testing.assert_allclose([np.linalg.norm(text), np.linalg.norm(image)], 1.0, atol=1e-5)

    @pytest.mark.parametrize("title", ["", " \n\t", "\x00\x07"])
    def test_nothing_to_look_at_is_refused(self, encoder: Encoder, title: str) -> None:
        with pytest.raises(EncodingFailed) as refused:
            encoder.prepare(ItemContent(item_id="empty", title=title, category="Dress"))
        assert refused.value.reason is Reason.NO_CONTENT
        assert "empty" in refused.value.detail

    def test_a_damaged_picture_is_refused_even_beside_a_good_title(self, encoder: Encoder) -> None:
        with pytest.raises(EncodingFailed) as refused:
            encoder.prepare(ItemContent(title="fine", image=picture(1)[:400]))
        assert refused.value.reason is Reason.BAD_IMAGE

    def test_item_id_and_price_do_not_change_the_vector(self, encoder: Encoder) -> None:
        mugs = [ItemContent(item_id=name, title="Mug", price=price) for name, price in (("a", 1.0), ("b", 9.0))]
        first, second = encode(encoder, *mugs)
        np.testing.assert_allclose(first, second, atol=1e-6)

    def test_threads_prepare_the_same_as_one_after_another(self, encoder: Encoder) -> None:
        many = ITEMS * 20
        with ThreadPoolExecutor(4) as pool:
            threaded = list(pool.map(encoder.prepare, many))
        for item, again in zip(threaded, map(encoder.prepare, many), strict=True):
            assert item.tokens == again.tokens
            assert (item.pixels is None and again.pixels is None) or np.array_equal(item.pixels, again.pixels)

    def test_two_loads_give_one_version_and_the_same_vectors(self, encoder: Encoder) -> None:
        again = self.make()
        assert again.version == encoder.version
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", encoder.version)
        np.testing.assert_array_equal(encode(again, *ITEMS), encode(encoder, *ITEMS))


class TestHashingEncoder(EncoderContract):
    @classmethod
    def make(cls) -> Encoder:
        return HashingEncoder(dim=48)

    def test_shared_words_bring_items_closer(self) -> None:
        a, b, c = encode(self.make(), *(ItemContent(title=title) for title in ("red dress", "red shirt", "drill")))
        assert a @ b > a @ c + 0.2


class TestDefaultEncoder(EncoderContract):
    @classmethod
    def make(cls) -> Encoder:
        return load_encoder(EncoderConfig())

    def test_has_128_dimensions(self, encoder: Encoder) -> None:
        assert encoder.dim == 128

    def test_meaning_brings_items_closer_than_shared_words(self, encoder: Encoder) -> None:
        titles = ("Evening gown in silk", "Formal satin dress", "Silk worm feeding kit")
        gown, dress, worm = encode(encoder, *(ItemContent(title=title) for title in titles))
        assert gown @ dress > gown @ worm

    def test_vectors_of_unlike_items_are_spread_around_zero(self, encoder: Encoder) -> None:
        titles = ("Wool coat", "Frying pan", "Wireless headphones", "Puzzle", "Tent", "Green tea", "Cat tree", "Novel")
        vectors = encode(encoder, *(ItemContent(title=title) for title in titles))
        cosines = (vectors @ vectors.T)[~np.eye(len(titles), dtype=bool)]
        assert abs(cosines.mean()) < 0.15
