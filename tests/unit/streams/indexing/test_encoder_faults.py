"""An encoder that raises: which item is at fault, or whether the device is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from encoders.base import ItemContent, Prepared
from schemas.errors import EncoderUnavailable, EncodingFailed, Misconfigured, Reason
from streams.indexing.encoding import ItemEncoding
from tests.factories.item_path import PICTURE_URL, CountingEncoder, ItemPath, b64, picture


class FaultyEncoder(CountingEncoder):
    """Runs out of memory above `room` contents, for contents named in `poison`, and as long as `dead` is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.room = 1_000
        self.dead = 0
        self.poison: set[bytes] = set()
        self.sizes: list[int] = []

    def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
        self.sizes.append(len(batch))
        if self.dead > 0:
            self.dead -= 1
            raise RuntimeError("CUDA error: device is gone")
        if len(batch) > self.room or self.poison & {one.address for one in batch}:
            raise RuntimeError("CUDA out of memory")
        return super().encode(batch)

    def poisoned_by(self, title: str) -> None:
        self.poison.add(self.prepare(ItemContent(title=title)).address)


@pytest.fixture
def encoder() -> FaultyEncoder:
    return FaultyEncoder()


@pytest.fixture
def path(encoder: FaultyEncoder) -> ItemPath:
    return ItemPath(encoder=encoder)


async def test_a_batch_that_does_not_fit_is_encoded_in_smaller_parts(path: ItemPath, encoder: FaultyEncoder) -> None:
    encoder.room = 3
    await path.index_all(*(path.publish(f"i{n}", title=f"t{n}") for n in range(40)))
    assert len(path.on_sale) == 40 and path.reasons == []
    assert (path.rows["i7"].vector == encoder.of(title="t7")).all()


async def test_only_the_item_that_fails_alone_gets_a_dead_letter(path: ItemPath, encoder: FaultyEncoder) -> None:
    encoder.poisoned_by("t5")
    report = await path.index_all(*(path.publish(f"i{n}", title=f"t{n}") for n in range(16)))
    assert set(path.on_sale) == {f"i{n}" for n in range(16)} - {"i5"}
    assert path.reasons == [("encode", Reason.ENCODER_FAILED, 5)]
    assert [record.offset for record in report.written if record.key == b"i5"] == []


async def test_a_device_that_fails_for_every_item_holds_the_batch_and_buries_nothing(
    path: ItemPath, encoder: FaultyEncoder
) -> None:
    encoder.dead = 30
    await path.index_all(*(path.publish(f"i{n}", title=f"t{n}") for n in range(8)))
    assert len(path.on_sale) == 8 and path.reasons == []


async def test_a_device_that_stays_dead_ends_the_process_with_what_to_do() -> None:
    encoder, now = FaultyEncoder(), 0.0
    encoder.dead = 1_000_000
    encoding = ItemEncoding(encoder, prepare_threads=1, patience_seconds=300, clock=lambda: now)
    batch = [encoder.prepare(ItemContent(title="x"))]
    for moment, error in ((0.0, EncoderUnavailable), (299.0, EncoderUnavailable), (300.0, Misconfigured)):
        now = moment
        with pytest.raises(error, match="device is gone"):
            await encoding.encode(batch)
    encoder.dead = 1  # healed: the next failure is one of its own
    with pytest.raises(EncodingFailed):
        await encoding.encode(batch)
    encoder.dead, now = 1_000_000, 400.0
    with pytest.raises(EncoderUnavailable):
        await encoding.encode(batch)


async def test_what_only_a_bug_raises_passes_through() -> None:
    class Wrong(CountingEncoder):
        def encode(self, batch: Sequence[Prepared]) -> NDArray[np.float32]:
            raise TypeError("a bug")

    encoding = ItemEncoding(Wrong(), prepare_threads=1)
    with pytest.raises(TypeError, match="a bug"):
        await encoding.encode([Wrong().prepare(ItemContent(title="x"))])


async def test_what_the_encoder_itself_says_of_a_content_is_not_judged_again(encoder: FaultyEncoder) -> None:
    said = EncodingFailed(Reason.BAD_VECTOR, "not finite")

    def encode(batch: Sequence[Prepared]) -> NDArray[np.float32]:
        encoder.sizes.append(len(batch))
        raise said

    encoder.encode = encode  # type: ignore[method-assign]
    encoding = ItemEncoding(encoder, prepare_threads=1)
    with pytest.raises(EncodingFailed) as caught:
        await encoding.encode([encoder.prepare(ItemContent(title="x"))])
    assert caught.value is said and encoder.sizes == [1]


async def test_a_late_picture_waits_for_a_dead_device_and_is_given_up_if_it_fails_alone(
    path: ItemPath, encoder: FaultyEncoder
) -> None:
    await path.index_all(path.publish("a", image_url=PICTURE_URL), path.publish("b", image_url=PICTURE_URL))
    path.web[PICTURE_URL] = picture()
    encoder.dead = 10
    assert (await path.retry()).outcome == "written"
    path.web[PICTURE_URL] = picture("blue")
    encoder.poison.add(encoder.prepare(ItemContent(image=picture("blue"))).address)
    assert (await path.retry()).outcome == "given_up"
    assert path.reasons == [("encode", Reason.ENCODER_FAILED, 0)]


async def test_what_cannot_be_prepared_for_a_reason_of_its_own_gets_a_dead_letter(
    path: ItemPath, encoder: FaultyEncoder
) -> None:
    prepare = encoder.prepare

    def prepared(content: ItemContent) -> Prepared:
        if content.title == "panics" or (content.title == "with a picture" and content.image):
            raise ValueError("the tokenizer panics")
        return prepare(content)

    encoder.prepare = prepared  # type: ignore[method-assign]
    await path.index_all(
        path.publish("a", title="panics"),
        path.publish("b", title="fine"),
        path.publish("c", title="with a picture", image=b64(picture())),  # no fault of the picture: whole or not at all
    )
    assert set(path.on_sale) == {"b"}
    assert path.reasons == [("encode", Reason.ENCODER_FAILED, 0), ("encode", Reason.ENCODER_FAILED, 2)]
