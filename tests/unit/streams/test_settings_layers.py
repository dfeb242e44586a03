"""What wins over what, where a value came from, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import Misconfigured
from streams.cli import main, split_common
from streams.commands.stack import exports
from streams.settings import (
    NO_SETTINGS,
    Settings,
    child_arguments,
    child_environment,
    child_settings,
    describe_settings,
    describe_values,
    environment_of,
    leaves,
    load_settings,
)
from streams.stack.config import StackConfig, folders_in
from streams.stack.folder import Ports
from streams.stack.run import endpoints_of, folders_of

PORTS = Ports(kafka=1, kafka_controller=2, valkey=3, milvus=4)

PRODUCTION = {
    "MIM_KAFKA__BOOTSTRAP_SERVERS": "prod:9092",
    "MIM_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
    "MIM_KAFKA__SASL_USERNAME": "prod",
    "MIM_KAFKA__SASL_PASSWORD": "prod-secret",
    "MIM_KAFKA__SSL_CAFILE": "/prod/ca.pem",
    "MIM_REDIS__URL": "rediss://prod:6379/0",
    "MIM_REDIS__PASSWORD": "prod-secret",
    "MIM_MILVUS__URI": "https://prod:19530",
    "MIM_MILVUS__TOKEN": "prod-secret",
    "MIM_MODELS__URL": "s3://prod/models",
    "MIM_MODELS__FOLDER": "/prod/models",
    "MIM_MODELS__STORAGE_OPTIONS": '{"endpoint_url": "http://prod"}',
    "MIM_TRAIN__SNAPSHOT_FOLDER": "/prod/snapshots",
    "MIM_TRAIN__STATE_FOLDER": "/prod/state",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("MIM_") and name != "MIM_TEST_DATA":
            monkeypatch.delenv(name)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


def in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PRODUCTION.items():
        monkeypatch.setenv(name, value)


def stack_values(name: str, config: StackConfig) -> dict[str, Any]:
    return endpoints_of(PORTS) | folders_of(config.data_folder / name)


def test_each_layer_wins_over_those_before_it_setting_by_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mim.toml"
    file.write_text('[topics]\nprefix = "file."\npartitions = 7\n[kafka]\nmax_record_bytes = 5000\n')
    monkeypatch.setenv("MIM_TOPICS__PREFIX", "env.")
    monkeypatch.setenv("MIM_KAFKA__REQUEST_TIMEOUT_MS", "3000")
    settings = load_settings(
        file, given=["kafka.request_timeout_ms=4000"], stack="try", find_stack=lambda *_: endpoints_of(PORTS)
    )
    assert (settings.topics.prefix, settings.topics.partitions) == ("env.", 7)
    # a table in the file neither drops the stack's address nor is dropped by it
    assert (settings.kafka.bootstrap_servers, settings.kafka.max_record_bytes) == ("127.0.0.1:1", 5000)
    assert settings.kafka.request_timeout_ms == 4000
    sources = {name: source for name, (_, source) in describe_values(settings).items()}
    assert sources["MIM_TOPICS__PREFIX"] == "environment"
    assert sources["MIM_TOPICS__PARTITIONS"] == sources["MIM_KAFKA__MAX_RECORD_BYTES"] == "file"
    assert sources["MIM_KAFKA__BOOTSTRAP_SERVERS"] == "--stack try"
    assert sources["MIM_KAFKA__REQUEST_TIMEOUT_MS"] == "command line"
    assert sources["MIM_KAFKA__CONNECT_TIMEOUT_MS"] == "default"


def test_a_stack_that_the_command_line_names_wins_over_a_production_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    in_production(monkeypatch)
    settings = load_settings(stack="try", find_stack=stack_values)
    told = describe_values(settings)
    assert {name: told[name] for name in PRODUCTION if "prod" in told[name][0] or "not shown" in told[name][0]} == {}
    assert settings.models.folder == settings.stack.data_folder / "try" / "models"
    assert settings.kafka.sasl_password is settings.redis.password is settings.milvus.token is None
    wished = load_settings(given=["MIM_MODELS__FOLDER=/mine"], stack="try", find_stack=stack_values)
    assert wished.models.folder == Path("/mine")


def test_every_setting_that_leads_to_a_server_or_logs_in_is_the_stacks() -> None:
    words = ("servers", "url", "uri", "user", "password", "token", "ssl", "sasl", "security", "storage", "folder")
    set_by_stack = set(environment_of(stack_values("try", StackConfig())))
    of_connections = {
        leaf.variable
        for leaf in leaves()
        if leaf.path[0] in ("kafka", "redis", "milvus", "models") and any(word in leaf.path[1] for word in words)
    }
    assert of_connections - set_by_stack == {"MIM_KAFKA__SASL_MECHANISM"}


def test_children_of_a_stack_of_ones_own_meet_no_production_either(monkeypatch: pytest.MonkeyPatch) -> None:
    in_production(monkeypatch)
    monkeypatch.setenv("MIM_TOPICS__PARTITIONS", "5")  # the command line wins over it in the child too
    parent = load_settings(given=["topics.partitions=3", "redis.url=redis://other:1/0"])
    values = stack_values("try", StackConfig())
    own = child_settings(parent, values)
    environment = child_environment(parent, values)
    for name in PRODUCTION:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    child = load_settings()
    assert child.topics.partitions == 3
    for part in values:
        assert getattr(child, part) == getattr(own, part)
        assert "prod" not in repr(getattr(child, part))


def test_lines_for_the_shell_unset_what_must_not_be_set() -> None:
    lines = exports(stack_values("try", StackConfig(data_folder=Path("/a folder")))).splitlines()
    assert "  unset MIM_KAFKA__SASL_PASSWORD" in lines and "  unset MIM_MODELS__URL" in lines
    assert "  export MIM_MODELS__FOLDER='/a folder/try/models'" in lines


def test_what_is_learned_from_a_stack_lies_in_its_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_STACK__DATA_FOLDER", "/stacks")
    default = load_settings()
    assert default.models.folder == folders_in(Path("/stacks/default"))["models"]["folder"]
    assert default.train.state_folder == Path("/stacks/default/train")
    # with a broker of one's own: no stack's folder
    monkeypatch.setenv("MIM_KAFKA__BOOTSTRAP_SERVERS", "prod:9092")
    assert not load_settings().models.folder.is_relative_to("/stacks")
    monkeypatch.setenv("MIM_MODELS__FOLDER", "/mine")
    monkeypatch.delenv("MIM_KAFKA__BOOTSTRAP_SERVERS")
    assert load_settings().models.folder == Path("/mine")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("MIM_SERVE_TOKENS", "MIM_SERVE__TOKENS"),
        ("MIM_MILVSU__URI", "MIM_MILVUS__URI"),
        ("MIM_TOPIC__PREFIX", "MIM_TOPICS__PREFIX"),
        ("mim_serve_tokens", "MIM_SERVE__TOKENS"),
        ("MIM_INDEX__FIELD_MAP__ITEM_ID", "MIM_INDEX__FIELD_MAP"),
        ("MIM_KAFKA", "MIM_KAFKA__"),
    ],
)
def test_a_mistyped_variable_is_refused_with_the_nearest_setting(
    typed: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(typed, "x")
    with pytest.raises(Misconfigured, match=f"{typed.upper()} is no setting; the nearest is {meant}"):
        load_settings()


def test_variables_of_others_that_begin_alike_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_WAREHOUSE", "x")
    for name in ("MIM_SERVE_SERVICE_HOST", "MIM_SERVE_SERVICE_PORT_HTTP", "MIM_SERVE_PORT_8080_TCP_ADDR", *NO_SETTINGS):
        monkeypatch.setenv(name, "" if name == "MIM_CONFIG" else "10.0.0.1")
    monkeypatch.setenv("MIM_SERVE_PORT", "tcp://10.0.0.1:8080")
    with capture_logs() as lines:
        load_settings()
    assert [line["variable"] for line in lines] == ["MIM_WAREHOUSE"]


def test_an_unknown_setting_in_a_file_or_on_the_command_line_is_told_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "mim.toml"
    file.write_text("[serve]\ntoken = ['0123456789abcdef']\n")
    with pytest.raises(Misconfigured, match="MIM_SERVE__TOKEN is no setting; the nearest is MIM_SERVE__TOKENS"):
        load_settings(file)
    with pytest.raises(Misconfigured, match="nearest is MIM_TOPICS__PREFIX"):
        load_settings(given=["topic.prefix=x"])
    with pytest.raises(Misconfigured, match="=VALUE"):
        load_settings(given=["topics.prefix"])


def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"[topics]\nprefix = '\xe9'\n")
    for path in (tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(Misconfigured, match="configuration file"):
            load_settings(path)


def test_every_list_that_is_no_json_is_told_by_its_variable_and_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [leaf for leaf in leaves() if leaf.is_json]
    assert len(lists) >= 9
    for leaf in lists:
        for wrong in ("hunter2,hunter3", "", "[hunter2]"):
            with monkeypatch.context() as patched:
                patched.setenv(leaf.variable, wrong)
                with pytest.raises(Misconfigured, match=leaf.variable) as told:
                    load_settings()
            assert "hunter2" not in str(told.value)


def test_every_default_is_printed_in_a_form_that_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Settings()
    for row in describe_settings():
        if row["default"]:
            monkeypatch.setenv(row["variable"], row["default"])
    settings = load_settings()
    for leaf in leaves():
        if "FOLDER" not in leaf.variable:  # `~` is expanded where it is used
            expected, found = plain, settings
            for name in leaf.path:
                expected, found = getattr(expected, name), getattr(found, name)
            assert found == expected, leaf.variable


def test_nested_values_survive_the_way_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "fusion": {"nested_widths": [16, 32]},
        "index": {"field_map": {}},
        "milvus": {"token": None},
        "trainer": {"model": {"hidden": (8, 4)}},
        "csft": {"hard_negatives": False},
    }
    for name, text in environment_of(values).items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MIM_TOPICS__PREFIX", "null")  # a name like any other where nothing else can be meant
    settings = load_settings()
    assert settings.topics.prefix == "null"
    assert settings.fusion.nested_widths == (16, 32)
    assert settings.trainer.model.hidden == (8, 4)
    assert settings.milvus.token is None and not settings.csft.hard_negatives and settings.index.field_map == {}


def test_values_in_force_are_shown_with_their_source_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIM_REDIS__URL", "redis://:hunter2@host:1/0")
    monkeypatch.setenv("MIM_SERVE__TOKENS", '["hunter2hunter2hunter2"]')
    monkeypatch.setenv("MIM_KAFKA__SASL_PASSWORD", "hunter2")
    monkeypatch.setenv("MIM_MODELS__STORAGE_OPTIONS", '{"secret": "hunter2"}')
    assert main(["settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "hunter2" in line]
    (line,) = [line for line in lines if line.startswith("MIM_REDIS__URL ")]
    assert "redis://host:1/0" in line and "environment" in line and "redis://127.0.0.1:16379/0" in line


def test_an_address_is_shown_without_a_login_in_its_options_and_a_bucket_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {leaf.path for leaf in leaves() if leaf.path[-1] in ("url", "uri")} == {
        ("redis", "url"), ("milvus", "uri"), ("models", "url"),
    }  # fmt: skip
    monkeypatch.setenv("MIM_REDIS__URL", "redis://host:1/0?password=hunter2")
    monkeypatch.setenv("MIM_MILVUS__URI", "http://root:hunter2@host:2")
    monkeypatch.setenv("MIM_MODELS__URL", "s3://bucket/pre@fix")
    told = describe_values(load_settings())
    assert told["MIM_REDIS__URL"][0] == "redis://host:1/0" and told["MIM_MILVUS__URI"][0] == "http://host:2"
    assert told["MIM_MODELS__URL"][0] == "s3://bucket/pre@fix"


def test_folders_follow_the_users_own_choice_unless_a_setting_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/d")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    monkeypatch.setenv("MIM_KAFKA__BOOTSTRAP_SERVERS", "prod:9092")
    found = load_settings()
    at = {
        "stacks": found.stack.data_folder,
        "train": found.train.state_folder,
        "models": found.models.folder,
        "encoders": found.encoders.folder,
    }
    assert at == {name: Path("/d/mimstream") / name for name in at}
    assert found.stack.cache_folder == found.encoders.cache_folder == Path("/c/mimstream")
    assert describe_values(found)["MIM_MODELS__FOLDER"] == ("/d/mimstream/models", "default")
    monkeypatch.setenv("MIM_MODELS__FOLDER", "/mine")
    assert load_settings().models.folder == Path("/mine")
    for name in ("MIM_MODELS__FOLDER", "MIM_KAFKA__BOOTSTRAP_SERVERS"):
        monkeypatch.delenv(name)
    assert load_settings().models.folder == folders_in(Path("/d/mimstream/stacks/default"))["models"]["folder"]


def test_the_file_of_the_command_line_wins_over_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        text = f'[topics]\nprefix = "{name}."\n[index.field_map]\ntitle = "label"\n'
        (tmp_path / f"{name}.toml").write_text(text)
    monkeypatch.setenv("MIM_CONFIG", str(tmp_path / "a.toml"))
    assert load_settings().topics.prefix == "a."
    assert load_settings(tmp_path / "b.toml").topics.prefix == "b."
    assert child_arguments(tmp_path / "b.toml") == [f"--config={tmp_path / 'b.toml'}"] and child_arguments(None) == []
    monkeypatch.setenv("MIM_INDEX__FIELD_MAP", '{"item_id": "sku"}')
    assert load_settings().index.field_map == {"item_id": "sku"}  # a setting that is a mapping is replaced whole


def test_a_wrong_value_is_told_with_its_place_its_source_and_without_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mim.toml").write_text("[trainer.model]\nhidden = [8, 'hunter2']\n")
    monkeypatch.setenv("MIM_KAFKA__REQUEST_TIMEOUT_MS", "hunter2")
    with pytest.raises(Misconfigured) as caught:
        load_settings(tmp_path / "mim.toml", given=["topics.partitions=0"])
    told = str(caught.value)
    for place, source in (
        (r"MIM_TRAINER__MODEL__HIDDEN\[1\]", "file"),
        ("MIM_KAFKA__REQUEST_TIMEOUT_MS", "environment"),
        ("MIM_TOPICS__PARTITIONS", "command line"),
    ):
        assert re.search(rf"^  {place}: .* \(from: {source}\)$", told, re.MULTILINE), told
    assert "hunter2" not in told


def test_common_options_stand_before_or_after_the_command() -> None:
    for words in (
        ["--stack", "demo", "--log-level=debug", "topics", "list", "--json"],
        ["topics", "list", "--stack", "demo", "--json", "--log-level", "debug"],
        ["topics", "--stack=demo", "list", "--log-level", "debug", "--json"],
    ):
        common, own = split_common(words)
        assert (common.stack_name, common.log_level) == ("demo", "debug")
        assert own == ["topics", "list", "--json"]
    common, own = split_common(["forget", "user", "--", "--stack"])
    assert common.stack_name is None and own == ["forget", "user", "--", "--stack"]
