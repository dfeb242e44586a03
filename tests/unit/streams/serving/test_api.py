"""The HTTP interface over stores in memory: answers, errors, and a model that changes under load."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest
import structlog

from schemas.items import embedding_key
from schemas.scoring import ScoreResponse
from streams.broker.records import BehaviourRecord
from streams.stores.vectors.item_index import InMemoryItemIndex
from tests.factories.samples import behaviour
from tests.factories.serving import DIM, VERSION, Bench, Down, Open, open_bench, release, row
from tests.factories.vector_cache import announced
from tests.factories.waiting import until

__all__ = ["open_bench"]


async def test_scores_come_in_the_order_asked_with_the_versions_used(open_bench: Open) -> None:
    bench = await open_bench()
    released = await bench.serve(1, 0.0)
    status, answer = await bench.post("/v1/score", {"user_id": "ann", "item_ids": ["lamp", "shoe", "gone", "nan"]})
    assert status == 200
    assert [s["item_id"] for s in answer["scores"]] == ["lamp", "shoe", "gone", "nan"]
    assert [s["has_vector"] for s in answer["scores"]] == [True, True, False, False]
    lamp, shoe, gone, nan = (s["probability"] for s in answer["scores"])
    assert shoe > lamp and gone == 0.5 and nan is None
    assert (answer["release_id"], answer["encoder_version"], answer["history_length"]) == (released, VERSION, 1)
    assert (
        ScoreResponse.model_validate(answer).model_dump(mode="json", exclude_unset=True) == answer
    )  # built by hand, as the schema says


async def test_a_user_without_history_and_a_trigger_item_are_scored(open_bench: Open) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    body = {"user_id": "nobody", "item_ids": ["shoe", "lamp"], "trigger_item": "boot"}
    _, answer = await bench.post("/v1/score", body)
    assert answer["history_length"] == 0
    assert answer["scores"][0]["probability"] > answer["scores"][1]["probability"]


async def history_of(bench: Bench, *items: str) -> None:
    """Let ann take these items, one a second."""
    events = [
        BehaviourRecord(n, behaviour(f"t{n}", "click", second=n, user="ann", item=item))
        for n, item in enumerate(items, 1)
    ]
    await bench.service.behaviours.record(0, events, first_offset=1, next_offset=1 + len(items))


async def test_a_score_rests_on_the_newest_takes_not_the_oldest(open_bench: Open) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    await history_of(bench, "shoe", "shoe-2", "shoe-3", "lamp")  # after the boot
    _, answer = await bench.post("/v1/score", {"user_id": "ann", "item_ids": ["shoe", "lamp"]})
    assert answer["history_length"] == 3, "as many as the model looks at"
    assert answer["scores"][1]["probability"] > answer["scores"][0]["probability"], "the last take was a lamp"


async def test_what_the_user_took_is_left_out_on_request_and_named(open_bench: Open) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    await history_of(bench, "x1", "x2", "x3", "x4")  # longer ago than the model looks, the boot is a take all the same
    body = {"user_id": "ann", "item_ids": ["shoe", "boot", "lamp", "x4", "boot"]}
    _, plain = await bench.post("/v1/score", body)
    _, answer = await bench.post("/v1/score", body | {"exclude_taken": True})
    assert [s["item_id"] for s in plain["scores"]] == body["item_ids"] and plain["left_out"] == []
    assert answer["left_out"] == ["boot", "x4", "boot"]
    assert answer["scores"] == [s for s in plain["scores"] if s["item_id"] in ("shoe", "lamp")]
    assert answer["history_length"] == plain["history_length"] == 3
    assert ScoreResponse.model_validate(answer).model_dump(mode="json", exclude_unset=True) == answer
    _, none = await bench.post("/v1/score", {"user_id": "ann", "item_ids": ["boot"], "exclude_taken": True})
    assert (none["scores"], none["left_out"]) == ([], ["boot"])


async def test_a_deleted_trigger_item_says_nothing_about_the_user(open_bench: Open) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    asked: list[list[str]] = []
    look_up = bench.service.vector_cache.look_up

    async def noting(item_ids: list[str]) -> Any:
        asked.append(item_ids)
        return await look_up(item_ids)

    bench.service.vector_cache.look_up = noting  # type: ignore[method-assign]
    bench.service.vector_cache.apply(embedding_key(VERSION, "lamp"), None)
    await bench.post("/v1/score", {"user_id": "ann", "item_ids": ["shoe"], "trigger_item": "lamp"})
    assert asked == [["shoe", "boot"]]


@pytest.mark.parametrize("nothing", [None, "", " "])
async def test_optional_fields_that_say_nothing_are_absent(open_bench: Open, nothing: str | None) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    plain = {"user_id": "nobody", "item_ids": ["shoe", "lamp"]}
    blank = plain | {"trigger_item": nothing, "exclude_taken": nothing}
    assert await bench.post("/v1/score", blank) == await bench.post("/v1/score", plain)
    status, _ = await bench.post("/v1/similar", {"item_id": "boot", "text": nothing, "image": nothing, "k": nothing})
    assert status == 200


async def test_before_the_first_release_scores_say_so_and_neighbours_work(open_bench: Open) -> None:
    bench = await open_bench()
    status, answer = await bench.post("/v1/score", {"user_id": "u", "item_ids": ["boot"]})
    assert (status, answer["error"]["code"]) == (503, "no_model")
    status, _ = await bench.post("/v1/similar", {"item_id": "boot"})
    assert status == 200
    status, answer = await bench.get("/readyz")
    assert (status, answer["ready"]) == (503, False)
    assert answer["checks"] == {
        "behaviours": "ok",
        "center": "ok",
        "model": "no model has been released yet",
        "states": "ok",
    }
    await bench.serve(1, 0.0)
    assert (await bench.get("/readyz"))[0] == 200


async def test_what_kafka_does_not_confirm_is_told_and_no_reason_to_be_unready(open_bench: Open) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    for confirmed in (None, asyncio.get_running_loop().time() - 6.0):
        if confirmed is not None:
            bench.service.vector_cache.confirm(confirmed)
        status, answer = await bench.get("/readyz")
        assert status == 200 and "Kafka" in answer["unconfirmed"][0]
    bench.service.vector_cache.confirm(asyncio.get_running_loop().time())
    status, answer = await bench.get("/readyz")
    assert status == 200 and len(answer["unconfirmed"]) == 1 and "what is taken" in answer["unconfirmed"][0]


async def test_only_scores_wait_for_the_newest_write(open_bench: Open) -> None:
    class Noting(InMemoryItemIndex):
        async def fetch(self, item_ids: Any, *, pending: bool = False, fresh: bool = True) -> Any:
            asked.append(fresh)
            return await super().fetch(item_ids, pending=pending)

    asked: list[bool] = []
    bench = await open_bench(index=Noting(encoder_version=VERSION, dim=DIM))
    await bench.serve(1, 0.0)
    for read in (bench.get("/v1/items/boot"), bench.post("/v1/similar", {"item_id": "boot"}), bench.get("/readyz")):
        await read
    assert asked == [False] * 3
    await bench.post("/v1/score", {"user_id": "ann", "item_ids": ["boot"]})
    assert asked[3:] == [True], "what is cached has to be the newest"


async def test_an_item_is_its_own_neighbour_only_on_request(open_bench: Open) -> None:
    bench = await open_bench()
    _, answer = await bench.post("/v1/similar", {"item_id": "boot", "k": 2})
    assert [n["item_id"] for n in answer["results"][0]["neighbours"]] == ["shoe", "lamp"]
    _, answer = await bench.post("/v1/similar", {"item_id": "boot", "k": 2, "include_self": True})
    first = answer["results"][0]["neighbours"][0]
    assert first["item_id"] == "boot" and first["similarity"] == pytest.approx(1.0, abs=1e-5)


async def test_many_items_are_answered_in_order_and_absent_ones_marked(open_bench: Open) -> None:
    bench = await open_bench()
    _, answer = await bench.post("/v1/similar", {"item_ids": ["lamp", "gone", "boot", "lamp"], "k": 1})
    found = [(r["query"], r["found"]) for r in answer["results"]]
    assert found == [("lamp", True), ("gone", False), ("boot", True), ("lamp", True)]
    assert answer["results"][2]["neighbours"][0]["item_id"] == "shoe"
    assert answer["results"][1]["neighbours"] == []


async def test_a_text_and_a_picture_find_their_items(open_bench: Open) -> None:
    bench = await open_bench()
    _, answer = await bench.post("/v1/similar", {"text": "desk lamp", "k": 1})
    assert answer["results"][0]["neighbours"][0]["item_id"] == "lamp"
    picture = base64.b64encode(b"picture red boot").decode()
    status, answer = await bench.post("/v1/similar", {"image": picture, "k": 1})
    assert status == 200 and answer["results"][0]["query"] is None


async def test_an_item_shows_what_the_center_holds(open_bench: Open) -> None:
    bench = await open_bench()
    status, answer = await bench.get("/v1/items/boot?vector=1")
    assert status == 200
    assert np.allclose(answer["vector"], bench.index.rows["boot"].vector)
    assert (answer["price"], answer["source_partition"], answer["source_offset"]) == (9.5, 2, 7)
    assert (await bench.get("/v1/items/boot"))[1]["vector"] is None
    await bench.index.upsert([row("a/b ü", "odd name")])
    assert (await bench.get("/v1/items/a%2Fb%20%C3%BC"))[1]["item_id"] == "a/b ü"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "named"),
    [
        ("POST", "/v1/score", b"{", 400, "bad_request", "JSON"),
        ("POST", "/v1/score", b"{}", 400, "bad_request", "user_id"),
        ("POST", "/v1/score", b'{"user_id":"u","item_ids":[]}', 400, "bad_request", "item_ids"),
        ("POST", "/v1/score", b'{"user_id":"u","item_ids":["a\\n"]}', 400, "bad_request", "item_ids.0"),
        ("POST", "/v1/similar", b'{"item_id":"a","text":"b"}', 400, "bad_request", "exactly one"),
        ("POST", "/v1/similar", b'{"item_id":"boot","k":0}', 400, "bad_request", "k"),
        ("POST", "/v1/similar", b'{"image":"!"}', 400, "bad_request", "image"),
        ("POST", "/v1/similar", b'{"image":"AAAA"}', 422, "bad_image", "picture"),
        ("POST", "/v1/similar", b'{"item_id":"gone"}', 404, "item_not_found", "gone"),
        ("GET", "/v1/items/gone", None, 404, "item_not_found", "gone"),
        ("GET", "/v1/items/" + "x" * 300, None, 400, "bad_request", "200"),
        ("GET", "/v1/items/%20a", None, 400, "bad_request", "printable"),
        ("GET", "/v1/items/a%00", None, 400, "bad_request", "printable"),
        ("GET", "/nowhere", None, 404, "not_found", ""),
        ("GET", "/v1/score", None, 405, "method_not_allowed", ""),
        ("POST", "/v1/score", b" " * 3_000, 413, "body_too_large", ""),
    ],
)
async def test_a_wrong_request_gets_a_clear_answer(
    open_bench: Open, method: str, path: str, body: bytes | None, status: int, code: str, named: str
) -> None:
    bench = await open_bench(max_body_bytes=2_048)
    response = await bench.client.request(method, path, data=body)
    error = (await response.json())["error"]
    assert (response.status, error["code"]) == (status, code)
    assert named in error["message"]


async def test_a_store_that_is_away_is_a_503_without_inner_addresses(open_bench: Open) -> None:
    bench = await open_bench(behaviours=Down())
    await bench.serve(1, 0.0)
    with structlog.testing.capture_logs() as logged:
        response = await bench.client.post("/v1/score", json={"user_id": "u", "item_ids": ["boot"]})
    text = await response.text()
    assert (response.status, response.headers["Retry-After"]) == (503, "1")
    assert "unavailable" in text and "10.1.2.3" not in text
    assert any("10.1.2.3" in str(line.get("error")) for line in logged)
    status, answer = await bench.get("/readyz")
    assert status == 503 and answer["checks"]["behaviours"] == "the behaviour store does not answer"


async def test_an_error_of_ours_shows_no_inside(open_bench: Open) -> None:
    bench = await open_bench()

    async def broken(*args: object, **more: object) -> Any:
        raise RuntimeError("secret detail")

    bench.index.fetch = broken
    with structlog.testing.capture_logs() as logged:
        response = await bench.client.get("/v1/items/boot")
    assert response.status == 500
    assert "secret" not in await response.text()
    assert [line["event"] for line in logged] == ["serve.failed"]


async def test_too_many_requests_at_once_are_refused_at_once(open_bench: Open) -> None:
    bench = await open_bench(max_concurrent_requests=2)
    gate, held = asyncio.Event(), 0
    fetch = bench.index.fetch

    async def slow(*args: Any, **more: Any) -> Any:
        nonlocal held
        held += 1
        await gate.wait()
        return await fetch(*args, **more)

    bench.index.fetch = slow
    waiting = [asyncio.create_task(bench.get("/v1/items/boot")) for _ in range(2)]
    await until(lambda: held == 2, every=0.01)
    try:
        async with asyncio.timeout(10):  # a third that is let in would wait for ever
            status, answer = await bench.get("/v1/items/boot")
            assert (status, answer["error"]["code"]) == (503, "overloaded")
            assert (await bench.get("/healthz"))[0] == 200
    finally:
        gate.set()
    assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]


async def test_a_newer_model_is_taken_up_under_load_without_a_failed_request(open_bench: Open) -> None:
    bench = await open_bench()
    first = release(bench.models, 1, -1.0)
    stop = asyncio.Event()
    watching = asyncio.create_task(bench.service.models.run(stop))
    await until(lambda: bench.service.models.current, every=0.01)
    seen: dict[str, float] = {}
    statuses: set[int] = set()

    async def ask() -> None:
        while not stop.is_set():
            status, answer = await bench.post("/v1/score", {"user_id": "nobody", "item_ids": ["boot"]})
            statuses.add(status)
            probability = answer["scores"][0]["probability"]
            assert seen.setdefault(answer["release_id"], probability) == probability
            await asyncio.sleep(0)

    askers = [asyncio.create_task(ask()) for _ in range(8)]
    released = [first]
    for number in range(2, 8):
        await until(lambda: released[-1] in seen, every=0.01)
        if number < 7:
            released.append(release(bench.models, number, float(number)))
    stop.set()
    await asyncio.gather(*askers, watching)
    assert statuses == {200}
    assert sorted(seen) == sorted(released)


@pytest.mark.parametrize(
    "damage", [{"name": "wrong"}, {"version": "other-1"}, {"bias": float("nan")}], ids=["weights", "encoder", "nan"]
)
async def test_a_release_that_cannot_be_used_is_reported_and_the_old_one_answers(
    open_bench: Open, damage: dict[str, Any]
) -> None:
    bench = await open_bench()
    good = await bench.serve(1, 0.0)
    release(bench.models, 2, **({"bias": 1.0} | damage))
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            await bench.service.models.refresh()
    assert [line["event"] for line in logged] == ["serve.model_refused"]
    status, answer = await bench.post("/v1/score", {"user_id": "u", "item_ids": ["boot"]})
    assert (status, answer["release_id"]) == (200, good)
    page = await (await bench.client.get("/metrics")).text()
    outcome = "wrong_encoder" if "version" in damage else "damaged"
    assert f'mim_model_loads_total{{outcome="{outcome}"}} 1.0' in page
    newer = await bench.serve(3, 2.0)
    assert (await bench.post("/v1/score", {"user_id": "u", "item_ids": ["boot"]}))[1]["release_id"] == newer


async def test_a_deleted_item_leaves_scores_neighbours_and_items(open_bench: Open) -> None:
    bench = await open_bench()
    await bench.serve(1, 0.0)
    score = {"user_id": "ann", "item_ids": ["shoe"]}
    assert (await bench.post("/v1/score", score))[1]["scores"][0]["has_vector"] is True
    await bench.index.delete(["shoe"])
    bench.service.vector_cache.apply(embedding_key(VERSION, "shoe"), None)
    assert (await bench.post("/v1/score", score))[1]["scores"][0] == {
        "item_id": "shoe",
        "probability": None,  # a model may know its id all the same
        "has_vector": False,
    }
    bench.service.vector_cache.apply(embedding_key(VERSION, "boot"), None)
    assert (await bench.post("/v1/score", score))[1]["history_length"] == 0  # nor does it speak for a user any more
    assert (await bench.get("/v1/items/shoe"))[0] == 404
    _, answer = await bench.post("/v1/similar", {"item_id": "boot"})
    assert "shoe" not in {n["item_id"] for n in answer["results"][0]["neighbours"]}
    again = row("shoe", "red summer shoe")
    await bench.index.upsert([again])
    bench.service.vector_cache.apply(*announced("shoe", again.vector, VERSION))
    assert (await bench.post("/v1/score", score))[1]["scores"][0]["probability"] is not None  # published again


async def test_requests_are_measured_by_route_never_by_path(open_bench: Open) -> None:
    bench = await open_bench()
    await bench.get("/v1/items/some-id-of-a-person")
    page = await (await bench.client.get("/metrics")).text()
    assert 'route="/v1/items/{item_id}",status="404"' in page
    assert "some-id" not in page
