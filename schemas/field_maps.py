"""Field maps: where a platform's records hold our fields, under names and in shapes of its own.

Each of our names has a place in the platform's record:

| place | means |
| --- | --- |
| `"sku"`, `"picture.href"`, `"pictures.0.href"` | a path: into objects by name, into lists by number |
| `"lines.sku"` | without a number, the list must have one element |
| `["sku", "id"]` | the first place that holds a value |
| `"user+time"` | the texts of several places, joined by `-` |
| `{"from": "name", "values": {"Product Viewed": "exposure"}}` | values translated; others stay as they are |
| `"header:ce_id"` | a header of the record |
| `"record:timestamp"` | the time at which the record was produced |
| `""` or null | nowhere: hides a field of the platform that has our name and another meaning |

`"attributes.colour": "specs.colour"` fills one attribute of an item, with all elements of a list on the way;
`"attributes": "specs"` takes an object whole. A named field is read from its place alone. `"*": ""` hides all fields
that the map does not name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel

from schemas.errors import BadMessage, Reason

FieldMap = dict[str, str | list[str] | dict[str, Any] | None]
"""Our field name -> its place."""

_ALL_OTHERS = "*"
_ATTRIBUTE = "attributes."
_HEADER = "header:"
_PRODUCED = "record:timestamp"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a record has beside its value."""

    produced_at: datetime
    headers: Iterable[tuple[str, bytes | None]] = ()


def is_blank(value: object) -> bool:
    """Whether a value says nothing: null, or a text of white space alone."""
    return value is None or (isinstance(value, str) and not value.strip())


def checked_field_map(field_map: FieldMap, model: type[BaseModel]) -> FieldMap:
    """The map, if it is one for the fields of `model`. Raises `ValueError`."""
    attributes = {name for name in field_map if name.startswith(_ATTRIBUTE) and "attributes" in model.model_fields}
    unknown = sorted(set(field_map) - attributes - set(model.model_fields) - {_ALL_OTHERS})
    if unknown:
        raise ValueError(f"no field is called {', '.join(unknown)}; there are {', '.join(model.model_fields)}")
    if field_map.get(_ALL_OTHERS):
        raise ValueError('"*" can only hide, so its place is ""')
    for name, entry in field_map.items():
        if isinstance(entry, dict):
            places, values = entry.get("from"), entry.get("values")
            texts = [places] if isinstance(places, str) else places
            if set(entry) != {"from", "values"} or not isinstance(texts, list) or not isinstance(values, dict):
                raise ValueError(f'{name}: a translation is {{"from": PLACE, "values": {{THEIRS: OURS}}}}')
            if not all(isinstance(text, str) for text in [*texts, *values.values()]):
                raise ValueError(f"{name}: places and values are texts")
    return field_map


def mapped(document: Mapping[str, Any], field_map: FieldMap, envelope: Envelope) -> dict[str, Any]:
    """The fields of a platform's record under our names. Raises `BadMessage` where a path is ambiguous."""
    fields: dict[str, Any] = {}
    named: dict[str, Any] = {}
    attributes = {name for name in field_map if name.startswith(_ATTRIBUTE)}
    if _ALL_OTHERS not in field_map:
        hidden = set(field_map) | ({"attributes"} if attributes else set())
        fields = {name: value for name, value in document.items() if name not in hidden}
    for ours, entry in field_map.items():
        places, values = (entry["from"], entry["values"]) if isinstance(entry, dict) else (entry or [], {})
        for place in [places] if isinstance(places, str) else places:
            value = _attribute(document, place, envelope) if ours in attributes else _joined(document, place, envelope)
            if not is_blank(value):
                value = values.get(str(value), value) if values else value
                if ours in attributes:
                    named[ours.removeprefix(_ATTRIBUTE)] = value
                else:
                    fields[ours] = value
                break
    whole = fields.get("attributes", {})
    if named and isinstance(whole, Mapping):  # what is no object is refused with the message
        fields["attributes"] = {**whole, **named}
    return fields


def _attribute(document: Mapping[str, Any], place: str, envelope: Envelope) -> Any:
    """The value of an attribute, which may be several: of every element of a list on the way."""
    if "+" in place or place == _PRODUCED or place.startswith(_HEADER):
        return _joined(document, place, envelope)
    found = [value for value in _every(document, place) if not is_blank(value)]
    if len(found) > 1:
        return [str(value) for value in found]
    return found[0] if found else None


def _every(value: Any, path: str) -> Iterator[Any]:
    step, _, rest = path.partition(".")
    if isinstance(value, list) and not (step and step.isdecimal()):
        for one in value:
            yield from _every(one, path)
    elif not path:
        yield value
    elif isinstance(value, list):
        if int(step) < len(value):
            yield from _every(value[int(step)], rest)
    elif isinstance(value, Mapping):
        if path in value:  # names may hold dots
            yield from _every(value[path], "")
        elif rest and step in value:
            yield from _every(value[step], rest)


def _joined(document: Mapping[str, Any], place: str, envelope: Envelope) -> Any:
    if "+" not in place:
        return _at(document, place, envelope)
    parts = [_at(document, part, envelope) for part in place.split("+")]
    return None if any(is_blank(part) for part in parts) else "-".join(map(str, parts))


def _at(document: Mapping[str, Any], place: str, envelope: Envelope) -> Any:
    if place == _PRODUCED:
        return envelope.produced_at
    if place.startswith(_HEADER):
        value = dict(envelope.headers).get(place.removeprefix(_HEADER))
        return None if value is None else value.decode(errors="backslashreplace")
    return _inside(document, place, place)


def _inside(value: Any, path: str, whole: str) -> Any:
    if not path:
        return _only(value, whole)
    step, _, rest = path.partition(".")
    if isinstance(value, list) and step.isdecimal():
        return _inside(value[int(step)], rest, whole) if int(step) < len(value) else None
    value = _only(value, whole)
    if not isinstance(value, Mapping):
        return None
    if path in value:  # names may hold dots
        return _only(value[path], whole)
    return _inside(value[step], rest, whole) if rest and step in value else None


def _only(value: Any, whole: str) -> Any:
    """The element of a list of one; what is no list stays as it is."""
    if not isinstance(value, list):
        return value
    if len(value) > 1:
        raise BadMessage(
            Reason.WRONG_TYPE,
            f"{whole}: a list of {len(value)} where one value is needed; send a record for each of them, or name one "
            "in the field map by its number",
        )
    return value[0] if value else None
