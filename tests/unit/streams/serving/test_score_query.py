"""Searches in scores: as training reads them, in time or left out, and never at the price of the score."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from structlog.testing import capture_logs

from encoders.base import ItemContent, Prepared
from encoders.preprocess import ImageLimits, decode_image
from schemas.errors import Misconfigured
from schemas.queries import query_id
from schemas.scoring import ScoreResponse
from schemas.skew import SkewRecord
from tests.factories.searches import (
    ENCODED_PHOTO,
    PHOTO,
    HeldEncoder,
    make_network,
    open_taught,
    probabilities,
    search_vector,
)
from tests.factories.served_states import AT, ITEMS, Trained, apply
from tests.factories.serving import SEARCH_FEATURES, Bench, Open, WordEncoder, open_bench
from tests.factories.waiting import until
from trainer.features.skew import recomputed, values_of
from trainer.features.states import ItemStates
from trainer.features.take_columns import TakeColumns
from trainer.samples.id_hashes import hash_columns
from trainer.samples.searches import searched

__all__ = ["open_bench"]

ASKED: dict[str, Any] = {"user_id": "ann", "item_ids": [*ITEMS, "never heard of"], "at": AT}
BOOTS = {"query_text": "Words of  boot"}


async def scores(bench: Bench, **more: Any) -> tuple[str | None, list[float]]:
    status, answer = await bench.post("/v1/score", ASKED | more)
    assert status == 200, answer
    return answer["query"], probabilities(answer)


@pytest.mark.parametrize("trigger", [None, "lamp"])
@pytest.mark.parametrize("user", ["ann", "nobody"])
@pytest.mark.parametrize(("text", "image"), [("Words of  boot", None), (None, PHOTO), ("red", PHOTO)])
async def test_a_search_is_scored_as_the_trainer_would_learn_from_it(
    open_bench: Open, text: str | None, image: bytes | None, user: str, trigger: str | None
) -> None:
    trained = Trained(SEARCH_FEATURES)
    bench, scorer = await open_taught(open_bench, encoder=HeldEncoder(), trained=trained)
    await apply(bench, trained.write())
    asked = {"query_text": text, "query_image": None if image is None else ENCODED_PHOTO}
    used, found = await scores(bench, user_id=user, trigger_item=trigger, **asked)
    history, seconds = await bench.service.behaviours.takes(user)
    more = [] if trigger is None else [trigger]
    learned = trained.batch(
        ASKED["item_ids"], [*history, *more], [*seconds, *(AT for _ in more)], AT,
        query_text=text, query_image=image, query_vector=search_vector(text, image),
    )  # fmt: skip
    served = scorer.batches[-1]
    assert served.dense_BF.numpy().tobytes() == learned.dense_BF.numpy().tobytes()
    past = [served.vectors_UV[row].numpy() for row in served.history_BL[0] if row]
    expected_past = [learned.vectors_UV[row].numpy() for row in learned.history_BL[0] if row]
    np.testing.assert_array_equal(past, expected_past)
    np.testing.assert_array_equal(past[0], search_vector(text, image))  # the newest of all
    assert len(past) == 1 + len(history) + len(more)
    with torch.inference_mode():
        expected = torch.sigmoid(make_network()(learned).double()).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert used == "used"
    plain_use, plain = await scores(bench, user_id=user, trigger_item=trigger)
    assert plain_use is None and not np.allclose(found, plain, rtol=1e-4)


async def test_the_same_words_beside_another_photo_are_another_search(open_bench: Open) -> None:
    bench, scorer = await open_taught(open_bench, encoder=HeldEncoder())
    other = base64.b64encode(b"picture of a lamp").decode()
    asked = [{}, {"query_image": ENCODED_PHOTO}, {"query_image": other}]
    found = [await scores(bench, query_text="red", **more) for more in asked]
    assert [used for used, _ in found] == ["used"] * 3 and len({tuple(each) for _, each in found}) == 3
    assert len({scorer.batches[n].vectors_UV[-1].numpy().tobytes() for n in range(3)}) == 3


async def test_words_and_titles_are_compared(open_bench: Open) -> None:
    bench, scorer = await open_taught(open_bench)
    await scores(bench, **BOOTS)
    boot, shoe = scorer.batches[-1].dense_BF.numpy()[:2, -4:]
    assert boot.tolist() == [1, 1, 1, 1] and shoe.tolist() == pytest.approx([1, 2 / 3, 2 / 3, 0])


async def test_blank_searches_are_none(open_bench: Open) -> None:
    bench, scorer = await open_taught(open_bench, encoder=HeldEncoder())
    expected = await scores(bench)
    for blank in ({"query_text": ""}, {"query_text": " \t"}, {"query_image": ""}, {"query_text": None}):
        assert await scores(bench, **blank) == expected and expected[0] is None
    assert not scorer.batches[-1].dense_BF[:, -4:].any()


async def test_a_release_that_was_not_taught_scores_as_without_the_search(open_bench: Open) -> None:
    encoder = HeldEncoder()
    bench, _ = await open_taught(open_bench, encoder=encoder, reads_queries=False)
    _, expected = await scores(bench)
    assert await scores(bench, **BOOTS) == ("not_read", expected) and not encoder.encoded


async def test_a_search_that_is_not_encoded_in_time_is_left_out_and_known_to_the_next_request(open_bench: Open) -> None:
    encoder = HeldEncoder()
    bench, _ = await open_taught(open_bench, encoder=encoder, query_deadline_ms=20)
    _, expected = await scores(bench)
    encoder.gate.clear()
    try:
        async with asyncio.timeout(10):  # not as long as the encoder takes
            assert await scores(bench, **BOOTS) == ("not_in_time", expected)
    finally:
        encoder.gate.set()
    await until(lambda: len(bench.service.queries.vectors) == 1, every=0.01)
    used, found = await scores(bench, query_text="Words of boot")
    assert used == "used" and found != expected and len(encoder.encoded) == 1


async def test_the_deadline_passes_while_the_stores_are_waited_for(open_bench: Open) -> None:
    encoder = HeldEncoder()
    bench, _ = await open_taught(open_bench, encoder=encoder, query_deadline_ms=60_000)
    await scores(bench)
    held, look_up = asyncio.Event(), bench.service.vector_cache.look_up
    bench.service.vector_cache.look_up = lambda ids: _after(held, look_up, ids)  # type: ignore[method-assign]
    asking = asyncio.create_task(scores(bench, **BOOTS))
    await until(lambda: len(bench.service.queries.vectors) == 1, every=0.01)  # before the look-up has ended
    held.set()
    assert (await asking)[0] == "used"


async def _after(event: asyncio.Event, call: Any, given: Any) -> Any:
    await event.wait()
    return await call(given)


async def test_of_searches_that_wait_only_so_many_are_encoded(open_bench: Open) -> None:
    encoder = HeldEncoder()
    bench, _ = await open_taught(open_bench, encoder=encoder, query_deadline_ms=60_000, max_waiting_queries=2)
    encoder.gate.clear()
    try:
        waiting = [asyncio.create_task(scores(bench, query_text=text)) for text in ("one", "two")]
        await until(lambda: len(encoder.encoded) == 2, every=0.01)
        async with asyncio.timeout(10):
            assert (await scores(bench, query_text="three"))[0] == "not_in_time"
        again = asyncio.create_task(scores(bench, query_text="one"))  # adds none
        await until(
            lambda: b'mim_query_searches_total{outcome="shared"} 1.0' in bench.service.metrics_page(), every=0.01
        )
    finally:
        encoder.gate.set()
    assert [used for used, _ in await asyncio.gather(*waiting, again)] == ["used"] * 3
    assert (await scores(bench, query_text="three"))[0] == "used" and len(encoder.encoded) == 3
    page = await (await bench.client.get("/metrics")).text()
    for outcome, count in {"hit": 0, "shared": 1, "encoded": 3, "not_in_time": 1, "refused": 0, "failed": 0}.items():
        assert f'mim_query_searches_total{{outcome="{outcome}"}} {count}.0' in page
    assert "mim_query_cache_searches 3.0" in page and "mim_query_encode_seconds_count 3.0" in page


async def test_a_server_without_an_encoder_scores_without_the_search_and_says_so_once(open_bench: Open) -> None:
    class Missing:
        async def get(self) -> Any:
            raise Misconfigured("MIM_ENCODER__BUNDLE=/srv/secret is not there")

    bench, _ = await open_taught(open_bench, encoder=Missing())
    _, expected = await scores(bench)
    with capture_logs() as said:
        for _ in range(3):
            assert await scores(bench, **BOOTS) == ("no_encoder", expected)
    assert [line["event"] for line in said] == ["serve.no_query_encoder"]
    assert (await bench.post("/v1/similar", {"text": "boot"}))[0] == 503


async def test_an_encoder_that_fails_costs_the_search_and_not_the_score(open_bench: Open) -> None:
    class Failing(WordEncoder):
        ill = True

        def encode_queries(self, batch: Any) -> Any:
            if self.ill:
                raise MemoryError("of the device")
            return self.encode(batch)

    encoder = Failing()
    bench, _ = await open_taught(open_bench, encoder=encoder)
    with capture_logs() as said:
        assert (await scores(bench, **BOOTS))[0] == "no_encoder"
    assert [line["event"] for line in said] == ["serve.query_not_encoded"]
    encoder.ill = False
    assert (await scores(bench, **BOOTS))[0] == "used"


class PictureEncoder(WordEncoder):
    """Decodes pictures as the real encoders do."""

    def prepare(self, content: ItemContent) -> Prepared:
        if content.image is not None:
            decode_image(content.image, size=32, limits=ImageLimits(max_bytes=50_000, max_pixels=1_000_000))
        return super().prepare(ItemContent(title=content.title or "a picture"))


def png(width: int, height: int) -> bytes:
    held = io.BytesIO()
    Image.new("1", (width, height)).save(held, "PNG")
    return held.getvalue()


@pytest.mark.parametrize(
    ("image", "code", "named"),
    [
        (b"AAAA", "bad_image", "picture has to be"),
        (png(40, 40)[:-30], "bad_image", "PNG"),
        (png(5_000, 5_000), "image_too_large", "5000 x 5000"),
        (png(40_000, 40_000)[:40_000], "image_too_large", ""),
        (bytes(60_000), "image_too_large", "60000 bytes"),
    ],
    ids=["no picture", "cut", "too many pixels", "a bomb", "too many bytes"],
)
@pytest.mark.parametrize("text", [None, "boots"])
async def test_a_picture_that_cannot_be_read_is_a_422_with_the_reason_and_the_server_lives(
    open_bench: Open, image: bytes, code: str, named: str, text: str | None
) -> None:
    bench, _ = await open_taught(open_bench, encoder=PictureEncoder(), query_deadline_ms=60_000)
    asked = ASKED | {"query_text": text, "query_image": base64.b64encode(image).decode()}
    for _ in range(2):  # what is refused is not kept
        status, answer = await bench.post("/v1/score", asked)
        assert (status, answer["error"]["code"]) == (422, code) and named in answer["error"]["message"]
    status, answer = await bench.post("/v1/similar", {"image": asked["query_image"]})
    assert (status, answer["error"]["code"]) == (422, code)
    assert (await scores(bench, query_image=base64.b64encode(png(40, 40)).decode()))[0] == "used"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"query_text": "x" * 10_001}, "query_text"),
        ({"query_text": "x" * 1_001}, "query_text"),
        ({"query_text": 7}, "query_text"),
        ({"query_image": "no base64!"}, "query_image"),
        ({"query": "boots"}, "query"),
    ],
)
async def test_a_search_of_another_form_is_refused_by_its_name(
    open_bench: Open, more: dict[str, Any], named: str
) -> None:
    bench, _ = await open_taught(open_bench)
    status, answer = await bench.post("/v1/score", ASKED | more)
    assert (status, answer["error"]["code"]) == (400, "bad_request") and f"{named}: " in answer["error"]["message"]
    assert (await scores(bench, query_text="x" * 1_000))[0] == "used"


async def test_the_answer_is_as_the_schema_says(open_bench: Open) -> None:
    bench, _ = await open_taught(open_bench)
    _, answer = await bench.post("/v1/score", ASKED | BOOTS)
    assert (
        ScoreResponse.model_validate(answer).model_dump(mode="json", exclude_unset=True) == answer
        and answer["history_length"] == 2
    )


async def test_what_is_counted_after_a_search_is_compared_with_the_trainers_own_counts(open_bench: Open) -> None:
    trained = Trained(SEARCH_FEATURES)
    bench, _scorer = await open_taught(open_bench, trained=trained)
    name = searched(BOOTS["query_text"], None)
    assert name is not None
    query, boot = trained.catalogue.number(name), trained.catalogue.number("boot")
    takes = [np.array(each) for each in ([1, 2], [boot, boot], [5, 9], [901, 902], [False, False], [query, query])]
    trained.state.add(TakeColumns(*takes), before=10)
    await apply(bench, trained.write(hold=True))
    assert (await scores(bench, trigger_item="lamp", **BOOTS))[0] == "used"
    (value,) = bench.service.skew.waiting
    served = SkewRecord.model_validate_json(value).served
    assert served is not None and served.history == ["shoe", "sofa", "lamp"] and served.history_seconds[-1] == AT
    assert served.query == query_id(BOOTS["query_text"], None) and BOOTS["query_text"].encode() not in value

    def states_of(item_ids: Sequence[str]) -> ItemStates:
        hashes_U2 = np.concatenate([np.zeros((1, 2), np.int64), hash_columns(item_ids)])
        return trained.state.held_states(hashes_U2, trained.catalogue.facts_by_id(item_ids))

    found = values_of(served, len(SEARCH_FEATURES.names))
    np.testing.assert_array_equal(found, recomputed(SEARCH_FEATURES, served, states_of))
    together = found[:, SEARCH_FEATURES.names.index("query together")]
    assert together[served.targets.index("boot")] == pytest.approx(np.log(3), abs=1e-3) and together.sum() < 1.2
    other = served.model_copy(update={"query": None})
    assert not np.array_equal(found, recomputed(SEARCH_FEATURES, other, states_of))
