"""What commands end with, print, and hand to the work behind them."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from schemas.behaviours import BehaviourKind
from schemas.errors import Misconfigured, StoreUnavailable
from streams.center.compare import CenterReport, Finding
from streams.commands import (
    arguments,
    bundle,
    center,
    check,
    csft,
    index,
    pretrain,
    record,
    serve,
    settings,
    trainset,
)
from streams.settings import Settings
from streams.wiring import encoder_training
from tests.factories.commands import SETTINGS, call
from trainer.csft.config import CsftConfig
from trainer.provenance.rebuild import TrainingRow

# ---- arguments that commands share -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "ten", "²"])
def test_a_whole_number_above_0_is_nothing_else(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        arguments.positive(text)
    assert (arguments.positive("1"), arguments.positive("25")) == (1, 25)


@pytest.mark.parametrize("text", ["-0.01", "1.01", "nan", "some", ""])
def test_a_share_lies_between_0_and_1_and_may_be_either(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="share from 0 to 1"):
        arguments.share(text)
    assert [arguments.share(one) for one in ("0", "0.25", "1")] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("roles", ["", " , ", "index,nothing"])
def test_a_check_of_no_process_or_an_unknown_one_is_refused(roles: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(check, "--for", roles)
    assert "name some of index, record, train, serve" in capsys.readouterr().err


def test_roles_are_named_with_commas_and_each_follows_its_topic() -> None:
    assert arguments.roles(" index,train ,") == ["index", "train"] and arguments.roles("") == []
    with pytest.raises(argparse.ArgumentTypeError, match="'serve' is none of index, record, train"):
        arguments.roles("index,serve")
    assert arguments.ROLES == {"index": "items", "record": "behaviours", "train": "behaviours"}


def test_a_moment_needs_a_zone_and_the_option_is_named() -> None:
    assert arguments.parse_moment("--from", "2026-09-16T00:00Z") == datetime(2026, 9, 16, tzinfo=UTC)
    for text, told in (("yesterday", "is not ISO 8601"), ("2026-09-16T00:00", "has no zone")):
        with pytest.raises(Misconfigured, match=f"--from '{text}' {told}"):
            arguments.parse_moment("--from", text)


# ---- center ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "repaired", "left", "status"),
    [(0, False, 0, 0), (2, False, 0, 1), (2, True, 0, 0), (2, True, 1, 1), (0, True, 1, 1)],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_a_center_with_a_fault_that_is_left_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, said: Any, faults: int, repaired: bool, left: int, status: int, as_json: bool
) -> None:
    asked: list[bool] = []
    report = CenterReport(records=9, repaired=repaired, left=left, mended=faults - left)
    for number in range(faults):
        report.add(Finding("stale", f"i{number}", 1, 7, "older"))

    async def verify(_: Settings, *, repair: bool, on_progress: Any) -> CenterReport:
        asked.append(repair)
        on_progress("reading", 1, 2)
        return report

    monkeypatch.setattr(center, "verify_center", verify)
    flags = ["--repair"] * repaired + ["--json"] * as_json
    assert call(center, "verify", *flags) == status and asked == [repaired]
    told = said(as_json=as_json)
    if as_json:
        assert (told["faults"], told["stale"], told["missing"], told["records"]) == (faults, faults, 0, 9)
        assert [one["item_id"] for one in told["examples"]] == [f"i{n}" for n in range(faults)] and "found" not in told
        assert (told["left"], told["repaired"]) == (left, repaired)
    else:
        assert ("1/7" in told) == bool(faults) and f"stale {faults}" in told and "examples" not in told


# ---- encoders --------------------------------------------------------------------------------------------------------

PRETRAINED = {
    "data": "a set", "items": 1_200, "steps": 30, "title_finds_image_before": 0.1, "title_finds_image": 0.6,
    "collapse": None, "encoder_version": "v1", "bundle": "/bundles/v1",
}  # fmt: skip
TRAINED = {
    "data": "a set", "pairs": 1_200, "steps": 30, "no_pair": {"no_history": 3, "held_out": 0}, "collapse": None,
    "encoder_version": "v1", "bundle": "/bundles/v1",
}  # fmt: skip


@pytest.mark.parametrize("collapse", [None, "mean pairwise cosine 0.99"])
def test_a_space_that_collapsed_is_no_bundle_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, said: Any, collapse: str | None
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        encoder_training, "run_pretrain", lambda _, *more: given.append(more) or PRETRAINED | {"collapse": collapse}
    )
    assert call(pretrain, "--epochs", "7", "--data", "d", "--out", "o") == (1 if collapse else 0)
    told = said()
    assert "a set: 1,200 items, 30 steps" in told and "0.1 before, 0.6 after" in told
    assert ("v1 in /bundles/v1" in told) == (collapse is None) and (f"NOT RELEASED: {collapse}" in told) == bool(
        collapse
    )
    assert call(pretrain, "--json") == (1 if collapse else 0)
    assert said(as_json=True)["collapse"] == collapse
    (config, folder, out), (plain, *nowhere) = given
    assert (config.epochs, folder, out) == (7, Path("d"), Path("o"))
    assert (plain, nowhere) == (SETTINGS.pretrain, [None, None])


@pytest.mark.parametrize("collapse", [None, "mean pairwise cosine 0.99"])
def test_training_that_collapsed_is_no_bundle_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, said: Any, collapse: str | None
) -> None:
    given: list[Any] = []

    def run(_: Settings, *positional: Any, **named: Any) -> dict[str, Any]:
        given.append((*positional, named))
        return TRAINED | {"collapse": collapse}

    monkeypatch.setattr(encoder_training, "run_csft", run)
    assert call(csft, "--data", "d", "--out", "o", "--test", "--dry-run") == (1 if collapse else 0)
    told = said()
    assert "a set: 1,200 pairs, 30 steps" in told and "takes that made no pair: 3 no history\n" in told
    assert ("MIM_ENCODER__BUNDLE=/bundles/v1" in told) == (collapse is None)
    assert (f"NOT RELEASED: {collapse}" in told) == bool(collapse)
    assert call(csft, "--json") == (1 if collapse else 0) and said(as_json=True)["pairs"] == 1_200
    assert given == [
        (SETTINGS.csft, Path("d"), Path("o"), {"with_test": True, "dry_run": True}),
        (SETTINGS.csft, None, None, {"with_test": False, "dry_run": False}),
    ]


def test_options_of_training_stand_above_the_settings_and_scl_is_a_recipe_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    csft.add_arguments(parser)

    def configured(*given: str) -> CsftConfig:
        return csft.configured(parser.parse_args(given), CsftConfig(epochs=5, seed=3))

    found = configured("--epochs", "2", "--log-q", "0", "--seed", "0")
    assert (found.epochs, found.log_q_strength, found.seed) == (2, 0.0, 0)
    assert configured() == CsftConfig(epochs=5, seed=3)
    assert configured("--scl", "--epochs", "2") == CsftConfig(epochs=2, seed=3).as_scl()


@pytest.mark.parametrize("command", [pretrain, csft])
def test_lora_without_its_package_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    lora = SETTINGS.model_copy(update={"tuning": SETTINGS.tuning.model_copy(update={"layers": "lora"})})
    asked: list[str] = []

    def require(module: str, needed_by: str) -> None:
        asked.append(module)
        raise Misconfigured(needed_by)

    monkeypatch.setattr(command, "require_package", require)
    with pytest.raises(Misconfigured, match="MIM_TUNING__LAYERS=lora"):
        call(command, to=lora)
    assert asked == ["peft"]


@pytest.mark.parametrize(
    ("given", "told"),
    [((), "--text or --image"), (("--tokens", "7"), "--tokens 7"), (("--tokens", "8193"), "--tokens 8193")],
)
def test_a_bundle_of_nothing_or_of_too_few_or_many_tokens_is_refused(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], told: str
) -> None:
    monkeypatch.setattr(encoder_training, "run_bundle_make", lambda *_: pytest.fail("nothing is made"))
    with pytest.raises(Misconfigured, match=told):
        call(bundle, "make", *given)


@pytest.mark.parametrize("tokens", ["8", "8192"])
def test_a_bundle_is_made_of_what_was_named_and_told_with_its_setting(
    monkeypatch: pytest.MonkeyPatch, said: Any, tokens: str
) -> None:
    given: list[Any] = []
    report = {"encoder_version": "v1", "bundle": "/b", "dim": 64, "tokens": 8, "size": 224}
    monkeypatch.setattr(encoder_training, "run_bundle_make", lambda _, *more: given.append(more) or report)
    assert call(bundle, "make", "--text", "t", "--image", "i", "--tokens", tokens, "--out", "o") == 0
    assert given == [("t", "i", int(tokens), Path("o"))]
    assert said() == "v1 in /b: 64 dimensions, 8 tokens, pictures of 224 pixels\nuse it: MIM_ENCODER__BUNDLE=/b\n"
    assert call(bundle, "make", "--image", "i", "--json") == 0 and said(as_json=True) == report


# ---- trainset --------------------------------------------------------------------------------------------------------

SUMMARY = {
    "release": "r000001-0", "rows": 2, "steps": 1, "rebuilt": 1, "erased": 1, "users": 3, "vectors": 4,
    "rows_tree_sha256": "ab" * 32, "verified": True, "problems": [],
}  # fmt: skip
ROWS = [
    TrainingRow(
        5, (1, 7), "e1", "u1", "i1", 60, 1, False, ("i2", "i3"), (10, 20), (0.5, 1.0), ["i4"], BehaviourKind.CART
    ),
    TrainingRow(5, (2, 8), "e2", "u2", "i2", 61, 0, True, (), (), (), None),
]


@pytest.mark.parametrize("verified", [True, False])
def test_rows_that_are_not_those_that_were_trained_end_with_1(
    monkeypatch: pytest.MonkeyPatch, said: Any, tmp_path: Path, verified: bool
) -> None:
    asked: list[Any] = []
    summary = SUMMARY | {"verified": verified, "problems": [] if verified else ["one row more", "a vector less"]}

    def rebuild(_: Settings, release: str, *, fetch_max_records: int | None) -> Any:
        asked.append((release, fetch_max_records))
        return summary, ROWS

    monkeypatch.setattr(trainset, "rebuild_release", rebuild)
    status = 0 if verified else 1
    assert call(trainset, "show", "r000001", "--fetch-max-records", "3") == status
    assert asked == [("r000001", 3)]
    head, *lines, counts, verdict = said().splitlines()
    assert head.split("\t") == ["step", "occurred_at", "event", "user", "item", "label", "history", "negatives"]
    assert [line.split("\t") for line in lines] == [
        ["5", "1970-01-01T00:01:00+00:00", "e1", "u1", "i1", "1", "i2,i3", "1"],
        ["5", "1970-01-01T00:01:01+00:00", "e2", "u2", "i2", "0", "-", "-"],
    ]
    assert counts == "r000001-0: 2 rows in 1 steps, 1 rebuilt, 1 erased"
    assert verdict.startswith(
        "verified: tree over 3 users' rows" if verified else "NOT verified: one row more; a vector"
    )
    assert call(trainset, "show", "r000001", "--json") == status
    told = said(as_json=True)
    assert told["verified"] is verified and [row["event_id"] for row in told["training_rows"]] == ["e1", "e2"]
    file = tmp_path / "rows.parquet"
    assert call(trainset, "show", "r000001", "--json", "--out", str(file)) == status
    assert said(as_json=True) == summary
    first, second = pq.read_table(file).to_pylist()
    assert first == {
        "step": 5, "partition": 1, "offset": 7, "event_id": "e1", "user_id": "u1", "item_id": "i1",
        "occurred_at": datetime(1970, 1, 1, 0, 1, tzinfo=UTC), "label": 1, "taken_as": "cart", "correction": False,
        "history": ["i2", "i3"], "history_seconds": [10, 20], "negatives": ["i4"],
    }  # fmt: skip
    assert second["correction"] is True and second["negatives"] is None and second["history"] == []
    with pytest.raises(StoreUnavailable, match="--out"):
        call(trainset, "show", "r000001", "--out", str(file / "below"))


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["", "-", "a b", "a/b", "a.b"])
def test_a_slot_is_named_with_letters_and_digits(monkeypatch: pytest.MonkeyPatch, slot: str) -> None:
    monkeypatch.setattr(index, "run_index_worker", lambda *_, **__: pytest.fail("nothing is indexed"))
    with pytest.raises(Misconfigured, match="--slot"):
        call(index, "--slot", slot) if slot != "-" else call(index, "--slot=-")


def test_an_index_worker_is_told_its_slot_or_removes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    async def worker(_: Settings, slot: str, **more: Any) -> None:
        done.append((slot, more))

    async def remove(_: Settings, slot: str) -> None:
        done.append(f"remove {slot}")

    monkeypatch.setattr(index, "run_index_worker", worker)
    monkeypatch.setattr(index, "remove_slot", remove)
    assert call(index) == call(index, "--slot", "eu_west-2", "--leave", "--metrics-port", "9") == 0
    assert call(index, "--slot", "3", "--remove") == 0
    assert done == [
        ("0", {"leave": False, "metrics_port": None}),
        ("eu_west-2", {"leave": True, "metrics_port": 9}),
        "remove 3",
    ]


def test_a_server_listens_where_the_options_say_and_else_where_the_settings_do(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    async def serving(_: Settings, config: Any) -> None:
        given.append((config.host, config.port))

    monkeypatch.setattr(serve, "serve", serving)
    monkeypatch.setattr(serve, "keep_freed_memory", lambda: None)
    assert call(serve) == call(serve, "--port", "0") == call(serve, "--host", "0.0.0.0") == 0
    assert given == [("127.0.0.1", 8080), ("127.0.0.1", 0), ("0.0.0.0", 8080)]


def test_a_recorder_rebuilds_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    async def recording(_: Settings, **more: Any) -> None:
        given.append(more)

    monkeypatch.setattr(record, "record", recording)
    assert call(record) == call(record, "--rebuild", "--metrics-port", "9") == 0
    assert given == [{"rebuild": False, "metrics_port": None}, {"rebuild": True, "metrics_port": 9}]


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_as_a_table_leave_no_cell_open() -> None:
    rows = [
        {"variable": "MIM_A", "default": "a|b", "meaning": "x | y"},
        {"variable": "MIM_B", "default": "", "meaning": ""},
    ]
    assert settings.as_markdown(rows).splitlines() == [
        "| variable | default | meaning |",
        "| --- | --- | --- |",
        "| MIM_A | `a\\|b` | x \\| y |",
        "| MIM_B |  |  |",
    ]
