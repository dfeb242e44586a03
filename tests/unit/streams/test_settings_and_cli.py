from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import Misconfigured
from streams.cli import COMMANDS, main
from streams.settings import Settings, child_environment, describe_settings, environment_of, load_settings

pytestmark = pytest.mark.usefixtures("alone")


def test_a_wrong_value_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_TOPICS__PARTITIONS", "many")
    with pytest.raises(Misconfigured, match="MIM_TOPICS__PARTITIONS"):
        load_settings()


def test_an_unknown_setting_in_the_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mim.toml"
    file.write_text("[kafka]\nbootstrap = 'x'\n")
    with pytest.raises(Misconfigured, match="MIM_KAFKA__BOOTSTRAP"):
        load_settings(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"gone\.toml"):
        load_settings(tmp_path / "gone.toml")


def test_nested_values_become_the_variables_that_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"kafka": {"bootstrap_servers": "h:9"}, "topics": {"prefix": "p."}}
    for name, value in environment_of(values).items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.kafka.bootstrap_servers, settings.topics.prefix) == ("h:9", "p.")


def test_secrets_are_not_shown() -> None:
    settings = Settings(kafka={"sasl_password": "hunter2"}, redis={"password": "hunter2"}, milvus={"token": "hunter2"})  # type: ignore[arg-type]
    assert "hunter2" not in repr(settings) + settings.model_dump_json()


def test_every_setting_says_what_it_means() -> None:
    rows = describe_settings()
    assert len(rows) > 50
    assert [row["variable"] for row in rows if len(row["meaning"]) < 10] == []


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        assert command in capsys.readouterr().out


def test_a_wrong_setting_ends_a_command_with_status_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MIM_TOPICS__PARTITIONS", "0")
    assert main(["settings"]) == 2
    assert "MIM_TOPICS__PARTITIONS" in capsys.readouterr().err


def test_a_broker_that_is_not_there_ends_a_command_with_its_setting() -> None:
    own = {"MIM_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:9", "MIM_KAFKA__CONNECT_TIMEOUT_MS": "1000"}
    command = [sys.executable, "-m", "streams", "topics", "list"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, check=False)
    assert ended.returncode == 3
    assert "MIM_KAFKA__BOOTSTRAP_SERVERS" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_settings_are_listed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "--json"]) == 0
    assert {"variable", "value", "from", "default", "meaning"} == set(json.loads(capsys.readouterr().out)[0])


def test_reading_settings_does_not_load_the_heavy_libraries() -> None:
    heavy = "('torch', 'faust', 'pymilvus', 'transformers')"
    code = f"import sys, streams.settings; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


FIELD_MAPS = {
    '{"item_id": "sku", "image": "", "title": ["name", "label"]}': None,
    '{"sku": "item_id"}': "MIM_INDEX__FIELD_MAP: .*no field is called sku",
    '{"title": 7}': "MIM_INDEX__FIELD_MAP",
    '{"event": {"from": "op"}}': "MIM_INDEX__FIELD_MAP: .*event: a translation",
    "sku": "MIM_INDEX__FIELD_MAP is not JSON",
}


@pytest.mark.parametrize("text", FIELD_MAPS)
def test_a_field_map_is_checked_when_settings_are_read(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_INDEX__FIELD_MAP", text)
    refused = FIELD_MAPS[text]
    if refused is None:
        assert load_settings().index.field_map == json.loads(text)
        return
    with pytest.raises(Misconfigured, match=refused):
        load_settings()


def test_a_field_map_of_behaviours_knows_their_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_RECORD__FIELD_MAP", '{"kind": {"from": "name", "values": {"seen": "exposure"}}}')
    assert load_settings().record.field_map == {"kind": {"from": "name", "values": {"seen": "exposure"}}}
    monkeypatch.setenv("MIM_RECORD__FIELD_MAP", '{"title": "name"}')
    with pytest.raises(Misconfigured, match=r"MIM_RECORD__FIELD_MAP: .*no field is called title"):
        load_settings()


def test_a_field_map_of_the_command_line_reaches_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(given=['index.field_map={"item_id": "sku", "*": ""}'])
    for name, value in child_environment(settings, {}).items():
        monkeypatch.setenv(name, value)
    assert load_settings().index.field_map == {"item_id": "sku", "*": ""}
