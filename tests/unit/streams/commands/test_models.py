"""`mimstream models` moves the pointer only where a user may, and shows the releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError

from schemas.errors import Misconfigured
from schemas.manifests import Fence, PromotionDecision, ReleaseNotice
from streams.cli import main
from streams.commands import models
from streams.commands.models import list_releases
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.registry import ModelRegistry, folder_registry
from tests.factories.releases import NOW, current_id, make_manifest, publish

FENCE = Fence(producer_id=1, epoch=4)
Call = Callable[..., Any]


@pytest.fixture
def store(tmp_path: Path) -> ModelRegistry:
    """r1, then its child r2, which is current; r3 was refused, r4 passed and was superseded."""
    store = folder_registry(ModelStoreConfig(folder=tmp_path))
    parent = None
    for number in (1, 2, 3, 4):
        made = publish(store, number, parent=parent)
        refused = PromotionDecision(
            passed=number != 3, reasons=["log-loss"] * (number == 3), figures={"ciubm_gauc": 0.6}
        )
        store.record_decision(made, refused)
        if number <= 2:
            store.promote(made, FENCE)
            parent = made
    return store


@pytest.fixture
def call(store: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Call:
    """Run `mimstream models ...` without a broker; the JSON that it printed, or its status if that is not 0."""
    monkeypatch.setenv("MIM_MODELS__FOLDER", str(tmp_path))
    monkeypatch.setenv("MIM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        status = main(["models", *arguments, "--json"])
        out, err = capsys.readouterr()
        return json.loads(out[out.index("\n{") :] if "\n{" in out else out) if status == 0 else (status, err)

    return run


def test_the_list_says_what_each_release_is(store: ModelRegistry) -> None:
    rows = list_releases(store, now=NOW + timedelta(days=2, seconds=90))
    assert [row["state"] for row in rows] == ["superseded", "current", "refused", "candidate"]
    assert [row["rows_trained"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["reasons"] == ["log-loss"] and rows[0]["age_seconds"] == 2 * 86_400 + 90
    assert rows[0]["metrics"] == {"ciubm_gauc": 0.6} and not any(row["pinned"] for row in rows)


def test_the_list_says_what_was_compared_and_what_was_not_and_why(store: ModelRegistry) -> None:
    first, second = make_manifest(1).release_id, make_manifest(2).release_id
    made = publish(store, 5, metrics={"ciubm_gauc": 0.5, "ciubm_logloss": 0.4})
    remarks = ["compared on 7 rows only, MIM_GATE__TRIAL_ROWS asks for 4000"]
    given: dict[str, Any] = {"passed": True, "against": second, "best": first, "rows": 7, "remarks": remarks}
    store.record_decision(made, PromotionDecision(**given, figures={"ciubm_gauc": 0.6}))
    undecided = publish(store, 6)
    listed = list_releases(store, now=NOW)
    assert listed[4]["metrics"] == {"ciubm_gauc": 0.6, "ciubm_logloss": 0.4}  # as the gate measured it, where it did
    rows = {row["release_id"]: row["compared"] for row in listed}
    assert rows[made] == f"r000002, 7 rows; best so far r000001; {remarks[0]}" and rows[undecided] is None


def test_a_rollback_goes_to_the_parent_pins_and_leaves_a_trail(store: ModelRegistry, call: Call) -> None:
    after = call("rollback", "--why", "complaints")
    assert after["release_id"] == make_manifest(1).release_id and after["pinned"] and not after["announced"]
    assert after["fence"] == FENCE.model_dump()
    assert [row["release_id"] for row in list_releases(store, now=NOW) if row["pinned"]] == [after["release_id"]]
    shown = call("show", "r000001")
    assert shown["manifest"]["rows_trained"] == 1
    history = [(h["action"], h["why"]) for h in shown["history"]]  # of this release alone
    assert history == [("released", None), ("rolled back", "complaints")]
    assert "@" in shown["history"][-1]["by"]
    status, said = call("rollback")
    assert status == 1 and "no parent" in said


def test_a_refused_release_can_be_promoted_by_hand(store: ModelRegistry, call: Call) -> None:
    after = call("promote", "r000003")
    assert after["release_id"] == make_manifest(3).release_id and not after["pinned"]
    assert call("show")["verdict"]["reasons"] == ["log-loss"]
    assert call("rollback", "--to", "r000002")["release_id"] == make_manifest(2).release_id


def test_a_pin_is_set_once_and_removed_once(store: ModelRegistry, call: Call) -> None:
    assert [call("pin")["changed"], call("pin")["changed"]] == [True, False]
    assert list_releases(store, now=NOW)[1]["pinned"]
    assert [call("unpin")["changed"], call("unpin")["changed"]] == [True, False]


class Broker:
    """Takes notices; away if it is told so."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes, ReleaseNotice]] = []
        self.stopped = 0
        self.away = False

    async def start(self) -> None: ...

    async def send_and_wait(self, topic: str, value: bytes, *, key: bytes) -> None:
        if self.away:
            raise KafkaConnectionError("away")
        self.sent.append((topic, key, ReleaseNotice.model_validate_json(value)))

    async def stop(self) -> None:
        self.stopped += 1


def test_servers_are_told_of_each_change_and_of_nothing_else(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()
    monkeypatch.setattr(models, "make_producer", lambda *_: broker)
    monkeypatch.setattr(models, "describe_topics", lambda *_: None)
    made = make_manifest(3)
    assert [call("promote", "r000003")["announced"], call("pin")["announced"]] == [True, True]
    assert call("pin")["announced"] is False
    assert [(topic, key, notice.release_id) for topic, key, notice in broker.sent] == [
        ("mim.models", made.release_id.encode(), made.release_id)
    ] * 2
    notice = broker.sent[0][2]
    assert (notice.weights_sha256, notice.encoder_version, notice.released_at) == (
        made.weights_sha256, made.encoder_version, made.created_at,
    )  # fmt: skip
    broker.away = True
    after = call("unpin")
    assert (after["changed"], after["announced"], broker.stopped) == (True, False, 3)


def test_nothing_is_moved_in_a_store_that_cannot_be_written(
    store: ModelRegistry, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: ModelRegistry) -> None:
        raise Misconfigured("cannot be written")

    monkeypatch.setattr(ModelRegistry, "check", check)
    for words in (["promote", "r000003"], ["rollback"], ["pin"]):
        assert call(*words)[0] == 2
    current = store.current()
    assert current is not None and (current.release_id, current.pinned) == (make_manifest(2).release_id, False)


def test_a_release_is_not_chosen_over_one_that_nobody_has_seen(
    store: ModelRegistry, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, newer = models.find_release, publish(store, 5, parent=make_manifest(2).release_id)

    def found_late(*arguments: Any) -> Any:
        if current_id(store) != newer:
            store.promote(newer, FENCE)
        return find(*arguments)

    monkeypatch.setattr(models, "find_release", found_late)
    status, _ = call("promote", "r000003")
    assert status == 1 and current_id(store) == newer


def test_what_is_not_there_or_fits_other_vectors_is_refused(store: ModelRegistry, call: Call) -> None:
    assert "no release" in call("promote", "r000009")[1] and "more than one" in call("promote", "r0")[1]
    status, said = call("promote", publish(store, 5, encoder_version="e2"))
    assert status == 1 and "e2" in said
    assert current_id(store) == make_manifest(2).release_id


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("r000002", f"release {make_manifest(2).release_id} was made before there was a journal"),
        ("r000009", "no release that is kept is called 'r000009': see 'mimstream models list'"),
        (make_manifest(9).release_id, "see 'mimstream models list'"),
        ("r00000", "more than one release that is kept is called 'r00000': see 'mimstream models list'"),
        ("../x", "see 'mimstream models list'"),
    ],
)
def test_the_training_set_of_a_release_is_asked_for_by_the_same_names(
    store: ModelRegistry, call: Call, capsys: Any, named: str, told: str
) -> None:
    assert main(["trainset", "show", named]) != 0
    assert told in " ".join(capsys.readouterr().err.split())
