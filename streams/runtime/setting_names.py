"""Single settings: their variables, and their values as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

ENV_PREFIX = "MIM_"
ENV_DELIMITER = "__"


@dataclass(frozen=True)
class Leaf:
    """One setting: where it stands in `Settings`, and its field."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return variable_of(self.path)

    @property
    def is_json(self) -> bool:
        """Whether its text is JSON: it holds a list or a mapping."""
        return any(issubclass(get_origin(one) or type, (tuple, list, dict)) for one in self._alternatives())

    @property
    def may_be_none(self) -> bool:
        """Whether `null` means: not set."""
        return type(None) in self._alternatives()

    @property
    def is_secret(self) -> bool:
        """Whether its value is not shown."""
        inner = [arg for one in self._alternatives() for arg in (one, *get_args(one))]
        return SecretStr in inner or self.path[-1] == "storage_options"

    def example(self) -> str:
        """How its text looks, for a message."""
        default = self.field.get_default(call_default_factory=True)
        return as_text(default) if default else '{"name": "value"}' if default == {} else '["first", "second"]'

    def _alternatives(self) -> tuple[Any, ...]:
        annotation = self.field.annotation
        return (annotation,) if get_origin(annotation) in (None, tuple, list, dict) else get_args(annotation)


def variable_of(path: tuple[str, ...]) -> str:
    """The environment variable of the setting at `path`."""
    return ENV_PREFIX + ENV_DELIMITER.join(path).upper()


def leaves_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every setting of a model of models, in order."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves_of(inner, (*path, name))
        else:
            yield Leaf((*path, name), field)


def as_text(value: object) -> str:
    """A value in the form in which it can be set; nothing for None."""
    if isinstance(value, bool | tuple | list | dict):
        return json.dumps(value, default=str)
    return "" if value is None else str(value)
