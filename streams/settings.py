"""Settings: the only reader of the environment. Each component owns its part; here they are put together."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

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
from streams.serving.config import ServeConfig
from streams.stack.config import StackConfig
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.histories.client import RedisConfig
from streams.stores.histories.config import BehaviourStoreConfig
from streams.stores.vectors.config import MilvusConfig
from streams.training.config import TrainConsumerConfig
from trainer.csft.config import CsftConfig, PretrainConfig
from trainer.online.config import TrainerConfig
from trainer.online.gate import GateConfig

ENV_PREFIX = "MIM_"
ENV_DELIMITER = "__"


class Settings(BaseSettings):
    """Everything that can be set: `MIM_KAFKA__BOOTSTRAP_SERVERS=...` in the environment, `[kafka]` in a TOML file."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file, as people expect who set a variable."""
        return env_settings, init_settings, InitSettingsSource(settings_cls, _user_folders())


def load_settings(config_file: Path | None = None, *, endpoints: dict[str, Any] | None = None) -> Settings:
    """Read the file (`config_file`, else the path in `MIM_CONFIG`), then the environment.

    `endpoints` are the addresses of an embedded stack; file and environment win over them.

    Raises `Misconfigured` naming each wrong setting.
    """
    path = config_file or (Path(os.environ["MIM_CONFIG"]) if os.environ.get("MIM_CONFIG") else None)
    values: dict[str, Any] = dict(endpoints or {})
    if path is not None:
        try:
            values = _merge(values, tomllib.loads(path.read_text()))
        except FileNotFoundError:
            raise Misconfigured(f"configuration file {path} does not exist (--config or MIM_CONFIG)") from None
        except tomllib.TOMLDecodeError as error:
            raise Misconfigured(f"configuration file {path} is not TOML: {error}") from None
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = [
            f"{ENV_PREFIX}{ENV_DELIMITER.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise Misconfigured("settings are wrong:\n  " + "\n  ".join(lines)) from None


def environment_of(values: dict[str, Any], prefix: str = ENV_PREFIX) -> dict[str, str]:
    """Nested values as the environment variables that would set them: what a parent hands to its children."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= environment_of(value, f"{prefix}{name.upper()}{ENV_DELIMITER}")
        else:
            flat[f"{prefix}{name.upper()}"] = str(value)
    return flat


def describe_settings(model: type[BaseModel] = Settings, prefix: str = ENV_PREFIX) -> list[dict[str, str]]:
    """One row per setting: the variable that sets it, its default and its docstring."""
    rows: list[dict[str, str]] = []
    for name, field in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            rows += describe_settings(inner, f"{variable}{ENV_DELIMITER}")
            continue
        default = field.get_default(call_default_factory=True)
        rows.append(
            {"variable": variable, "default": _shown(default), "meaning": " ".join((field.description or "").split())}
        )
    return rows


def _shown(default: object) -> str:
    if isinstance(default, Path):
        # the user's own folders differ from machine to machine
        return "~/" + str(default.relative_to(Path.home())) if default.is_relative_to(Path.home()) else str(default)
    return "required" if default is PydanticUndefined else "" if default is None else str(default)


def child_environment(values: dict[str, Any]) -> dict[str, str]:
    """This process's environment with `values` on top: what a child is started with."""
    return {**os.environ, **environment_of(values)}


def child_settings(settings: Settings, values: dict[str, dict[str, Any]]) -> Settings:
    """`settings` with `values` on top: what a child with `child_environment(values)` reads."""
    parts = {name: getattr(settings, name) for name in values}
    update = {name: type(part).model_validate(part.model_dump() | values[name]) for name, part in parts.items()}
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


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        merged[name] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
