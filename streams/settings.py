"""Settings: the only reader of the environment. Each component owns its part; here they are put together."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticUndefined

from encoders.config import EncoderConfig
from encoders.fusion_config import FusionConfig
from encoders.tuning_config import TuningConfig
from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.encoder_training.config import EncoderTrainingConfig
from streams.indexing.config import IndexConfig
from streams.indexing.image_fetch import ImageFetchConfig
from streams.monitoring.config import MetricsConfig
from streams.recording.config import RecordConfig
from streams.replay.config import ReplayConfig
from streams.runtime.endpoints import shown_endpoint
from streams.runtime.setting_names import ENV_DELIMITER, ENV_PREFIX, Leaf, as_text, leaves_of, variable_of
from streams.serving.config import ServeConfig
from streams.stack.config import DEFAULT_STACK, StackConfig, folders_in
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.histories.client import RedisConfig
from streams.stores.histories.config import BehaviourStoreConfig
from streams.stores.vectors.config import MilvusConfig
from streams.training.config import TrainConsumerConfig
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.online.config import TrainerConfig
from trainer.online.gate import GateConfig

log = structlog.get_logger()

NO_SETTINGS = frozenset({"MIM_CONFIG", "MIM_TEST_DATA"})
"""Variables that begin like settings and are none."""

_OF_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?$")
"""What Kubernetes sets in every container for a service whose name begins with `mim-`."""

_WITH_LOGIN = frozenset({("redis", "url"), ("milvus", "uri")})
"""Addresses that may hold a login, before the host or among the options."""

_SURELY_MEANT = 0.8
"""How alike (`difflib`) a variable and a setting are, so that the one is taken for a slip of the other."""

Values = Mapping[str, Any]


class Settings(BaseModel):
    """Everything that can be set: `MIM_KAFKA__BOOTSTRAP_SERVERS=...` in the environment, `[kafka]` in a TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kafka: BrokerConfig = Field(default_factory=BrokerConfig)
    """The broker."""
    topics: TopicsConfig = Field(default_factory=TopicsConfig)
    """Topic names and sizes."""
    redis: RedisConfig = Field(default_factory=RedisConfig)
    """Redis or Valkey."""
    milvus: MilvusConfig = Field(default_factory=MilvusConfig)
    """Milvus, which holds the vectors."""
    csft: CsftConfig = Field(default_factory=CsftConfig)
    """`mimstream csft`: how an encoder learns from behaviours."""
    fusion: FusionConfig = Field(default_factory=FusionConfig)
    """Shape of a newly trained encoder."""
    tuning: TuningConfig = Field(default_factory=TuningConfig)
    """Which layers of the towers learn in `pretrain` and `csft`."""
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig)
    """`mimstream pretrain`: how an encoder learns from items alone."""
    encoders: EncoderTrainingConfig = Field(default_factory=EncoderTrainingConfig)
    """Folders of trained encoders and of cached features."""
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    """The encoder of items; all processes name the same one."""
    images: ImageFetchConfig = Field(default_factory=ImageFetchConfig)
    """Pictures by URL."""
    index: IndexConfig = Field(default_factory=IndexConfig)
    """`mimstream index`."""
    behaviours: BehaviourStoreConfig = Field(default_factory=BehaviourStoreConfig)
    """What is kept of each user."""
    record: RecordConfig = Field(default_factory=RecordConfig)
    """`mimstream record`."""
    train: TrainConsumerConfig = Field(default_factory=TrainConsumerConfig)
    """`mimstream train`: reading, waiting, reporting."""
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    """The sliding window, the model and how it learns."""
    gate: GateConfig = Field(default_factory=GateConfig)
    """The promotion gate: when a candidate may replace the release that answers."""
    models: ModelStoreConfig = Field(default_factory=ModelStoreConfig)
    """Where released models are kept."""
    serve: ServeConfig = Field(default_factory=ServeConfig)
    """`mimstream serve`."""
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    """Where metrics are shown."""
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    """How far a replay runs ahead."""
    stack: StackConfig = Field(default_factory=StackConfig)
    """The embedded Kafka, Valkey and Milvus Lite."""

    _sources: dict[tuple[str, ...], str] = PrivateAttr(default_factory=dict)
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    def source_of(self, path: tuple[str, ...]) -> str:
        """What gave the setting at `path` its value: `default`, the file, `environment`, `--stack`, `command line`."""
        return self._sources.get(path, "default")


def load_settings(
    config_file: Path | None = None,
    *,
    given: Sequence[str] = (),
    stack: str | None = None,
    find_stack: Callable[[str, StackConfig], Values] | None = None,
    command: str | None = None,
) -> Settings:
    """Put the settings together. Each of these wins over those before it, setting by setting: the defaults, the file
    (`config_file`, else the path in `MIM_CONFIG`), the environment, the embedded stack that the command line names
    (`find_stack` tells its values), and single settings of the command line (`given`, each `NAME=VALUE`). `command`
    names this process to the broker.

    Raises `Misconfigured` naming each wrong setting, with the nearest known name of a mistyped one.
    """
    layers = {"file": _file_values(config_file), "environment": _environment_values()}
    last = {"command line": _given_values(given)}
    config = _settings_of(layers | last).stack
    if stack is not None and find_stack is not None:
        layers[f"--stack {stack}"] = find_stack(stack, config)
    settings = _settings_of(layers | last)
    if command is not None and ("kafka", "client_id") not in settings._sources:
        named = settings.kafka.model_copy(update={"client_id": f"{settings.kafka.client_id}-{command}"})
        settings = settings.model_copy(update={"kafka": named})
    settings._given.update(last["command line"])
    return settings


def _settings_of(layers: Mapping[str, Values]) -> Settings:
    values = _merged(*layers.values())
    sources = {path: name for name, values in layers.items() for path in _paths(values)}
    try:
        if ("kafka", "bootstrap_servers") not in sources:
            # the default address is the default stack's: what is learned from its log belongs to it
            stacks = Settings(stack=_merged(_user_folders(), values).get("stack", {})).stack.data_folder.expanduser()
            values = _merged(folders_in(stacks / DEFAULT_STACK), values)
        settings = Settings(**_merged(_user_folders(), values))
    except ValidationError as error:
        lines = [_told(item["loc"], item["type"], item["msg"], sources) for item in error.errors(include_url=False)]
        raise Misconfigured("settings are wrong:\n  " + "\n  ".join(dict.fromkeys(lines))) from None
    settings._sources.update(sources)
    return settings


def _told(loc: tuple[int | str, ...], kind: str, message: str, sources: Mapping[tuple[str, ...], str]) -> str:
    """A line about one wrong value, which is not repeated: it may be a secret."""
    path = max((leaf.path for leaf in leaves() if leaf.path == loc[: len(leaf.path)]), key=len, default=None)
    if path is None:
        name = variable_of(tuple(map(str, loc)))
        hint = f"the nearest is {_nearest(name)[0]}" if kind == "extra_forbidden" else message
        return f"{name} is no setting; {hint}" if kind == "extra_forbidden" else f"{name}: {message}"
    inside = "".join(f"[{part}]" for part in loc[len(path) :])
    return f"{variable_of(path)}{inside}: {message} (from: {sources.get(path, 'default')})"


def _file_values(config_file: Path | None) -> Values:
    path = config_file or (Path(os.environ["MIM_CONFIG"]) if os.environ.get("MIM_CONFIG") else None)
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Misconfigured(f"configuration file {path} does not exist (--config or MIM_CONFIG)") from None
    except OSError as error:
        raise Misconfigured(f"configuration file {path}: {error.strerror} (--config or MIM_CONFIG)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured(f"configuration file {path} is not TOML: {error}") from None


def _environment_values() -> Values:
    """The settings among the variables. A mistyped one is refused: what it was to set would be off in silence."""
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for given, text in os.environ.items():
        name = given.upper()
        if not name.startswith(ENV_PREFIX) or name in NO_SETTINGS or _put(values, name, text):
            continue
        if _OF_KUBERNETES.search(name) or text.startswith(("tcp://", "udp://")):
            continue
        nearest, likeness = _nearest(name)
        of_a_part = ENV_DELIMITER in name or name.removeprefix(ENV_PREFIX).lower() in Settings.model_fields
        if of_a_part or likeness >= _SURELY_MEANT:
            wrong.append(f"{name} is no setting; the nearest is {nearest}")
        else:
            log.warning("settings.unknown_variable", variable=name, nearest=nearest)
    if wrong:
        raise Misconfigured("settings are wrong ('mimstream settings' lists all):\n  " + "\n  ".join(wrong))
    return values


def _given_values(given: Sequence[str]) -> Values:
    values: dict[str, Any] = {}
    for one in given:
        name, separator, text = one.partition("=")
        variable = name if name.startswith(ENV_PREFIX) else variable_of(tuple(name.split(".")))
        if not separator:
            raise Misconfigured(f"--set {name}: write it like --set {leaves()[0].variable}=VALUE")
        if not _put(values, variable, text):
            raise Misconfigured(f"--set {name}: {variable} is no setting; the nearest is {_nearest(variable)[0]}")
    return values


def _put(values: dict[str, Any], variable: str, text: str) -> bool:
    """Put what a variable says into nested `values`; False if it is no setting. Raises `Misconfigured`."""
    for leaf in leaves():
        if variable == leaf.variable:
            value = None if text == "null" and leaf.may_be_none else _json(leaf, text) if leaf.is_json else text
            _merge_into(values, leaf.path, value)
            return True
    return False


def _json(leaf: Leaf, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # the text may be a secret
        raise Misconfigured(
            f"settings are wrong:\n  {leaf.variable} is not JSON: write it like {leaf.variable}='{leaf.example()}'"
        ) from None


def _merge_into(values: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
    values[path[-1]] = value


def _nearest(variable: str) -> tuple[str, float]:
    """The setting whose variable is most alike, and how alike it is, from 0 to 1."""
    name = max((leaf.variable for leaf in leaves()), key=lambda known: SequenceMatcher(None, variable, known).ratio())
    return name, SequenceMatcher(None, variable, name).ratio()


@cache
def leaves() -> tuple[Leaf, ...]:
    """Every setting, in the order of the models."""
    return tuple(leaves_of(Settings))


def environment_of(values: Values, prefix: str = ENV_PREFIX) -> dict[str, str]:
    """Nested values as the environment variables that would set them: what a parent hands to its children."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        variable = f"{prefix}{name.upper()}"
        if isinstance(value, Mapping) and value and variable not in (leaf.variable for leaf in leaves()):
            flat |= environment_of(value, f"{variable}{ENV_DELIMITER}")
        else:
            flat[variable] = "null" if value is None else as_text(value)
    return flat


def describe_settings() -> list[dict[str, str]]:
    """One row per setting: the variable that sets it, its default and its docstring."""
    rows: list[dict[str, str]] = []
    for leaf in leaves():
        default = leaf.field.get_default(call_default_factory=True)
        if isinstance(default, Path) and default.is_relative_to(Path.home()):
            default = "~" / default.relative_to(Path.home())  # differs from machine to machine
        required = default is PydanticUndefined
        rows.append(
            {
                "variable": leaf.variable,
                "default": "required" if required else as_text(default),
                "meaning": " ".join((leaf.field.description or "").split()),
            }
        )
    return rows


def describe_values(settings: Settings) -> dict[str, tuple[str, str]]:
    """Of each setting by its variable: the value in force, in the form in which it can be set, and what gave it.

    Secrets are not shown.
    """
    found: dict[str, tuple[str, str]] = {}
    for leaf in leaves():
        value: Any = settings
        for name in leaf.path:
            value = getattr(value, name)
        text = as_text(value)
        if leaf.is_secret and value:
            text = "(set, not shown)"
        elif leaf.path in _WITH_LOGIN:
            text = shown_endpoint(text)
        found[leaf.variable] = (text, settings.source_of(leaf.path))
    return found


def child_environment(settings: Settings, values: Values) -> dict[str, str]:
    """This process's environment and what its command line sets, with `values` on top: what a child is started with."""
    return {**os.environ, **environment_of(settings._given), **environment_of(values)}


def child_settings(settings: Settings, values: Mapping[str, Values]) -> Settings:
    """`settings` with `values` on top: what a child with `child_environment(settings, values)` reads."""
    parts = {name: getattr(settings, name) for name in values}
    update = {name: type(part).model_validate(part.model_dump() | dict(values[name])) for name, part in parts.items()}
    return settings.model_copy(update=update)


def child_arguments(config_file: Path | None) -> list[str]:
    """Arguments that hand the configuration file on to a child."""
    return [] if config_file is None else [f"--config={config_file}"]


_USER_FOLDERS = (
    ("XDG_DATA_HOME", "stack", "data_folder", "stacks"),
    ("XDG_DATA_HOME", "train", "state_folder", "train"),
    ("XDG_DATA_HOME", "models", "folder", "models"),
    ("XDG_DATA_HOME", "encoders", "folder", "encoders"),
    ("XDG_CACHE_HOME", "stack", "cache_folder", ""),
    ("XDG_CACHE_HOME", "encoders", "cache_folder", ""),
)


def _user_folders() -> dict[str, Any]:
    """Defaults that follow the user's own choice of folders (XDG base directories)."""
    found: dict[str, Any] = {}
    for variable, part, name, folder in _USER_FOLDERS:
        if base := os.environ.get(variable):
            found.setdefault(part, {})[name] = Path(base) / "mimstream" / folder
    return found


def _merged(*layers: Values, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Later layers on top of earlier ones, setting by setting; a setting that is itself a mapping is replaced whole."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            inner, here = merged.get(name), (*path, name)
            if isinstance(inner, Mapping) and isinstance(value, Mapping) and here not in _leaf_paths():
                merged[name] = _merged(inner, value, path=here)
            else:
                merged[name] = value
    return merged


@cache
def _leaf_paths() -> frozenset[tuple[str, ...]]:
    return frozenset(leaf.path for leaf in leaves())


def _paths(values: Values) -> Iterator[tuple[str, ...]]:
    """The settings that nested values set."""
    for leaf in leaves():
        inner: Any = values
        for name in leaf.path:
            inner = inner[name] if isinstance(inner, Mapping) and name in inner else _ABSENT
        if inner is not _ABSENT:
            yield leaf.path


_ABSENT = object()
