"""Attributes of items: what a platform knows of an item beside its title, by names of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat

MOST_ATTRIBUTES = 32
MOST_VALUES = 32
"""Texts of one attribute."""
MOST_WORDS = 32
"""Values of an item, of all attributes, that an encoder reads."""
MAX_NAME_CHARACTERS = 64
MAX_VALUE_CHARACTERS = 200
MAX_CHARACTERS = 8_000
"""Of all names and texts of an item together."""

Text = Annotated[str, Field(max_length=MAX_VALUE_CHARACTERS)]
Attribute = Text | Annotated[list[Text], Field(max_length=MOST_VALUES)] | FiniteFloat
PublishedAtIs = Literal["known", "inferred", "unknown"]
"""Where the time of publication comes from: the platform; the item's first take; nowhere (the first time seen)."""

_OUTCOME = re.compile(
    r"(^|_)(rating|rated|score|star|sale|sold|revenue|view|viewed|click|clicked|like|liked|purchase|order|popularity"
    r"|popular|rank|ranking|ctr|conversion|review|interaction|impression|download)s?(_|$)"
)


def looks_like_an_outcome(name: str) -> bool:
    """Whether an attribute may tell what became of an item (ratings, sales): nobody knew it when the item was shown."""
    return bool(_OUTCOME.search(re.sub(r"(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", "_", name).lower()))


def words_of(attributes: Mapping[str, Attribute]) -> list[tuple[str, str]]:
    """Each attribute that is words as (name, value), at most `MOST_WORDS`; the first values of all names come first.

    Numbers are left out. Values that differ in case or blanks at their ends alone are one. In an order that does not
    depend on that of the attributes.
    """
    found: dict[tuple[str, str], int] = {}
    for name in sorted(attributes):
        value = attributes[name]
        texts = [value] if isinstance(value, str) else [] if isinstance(value, int | float) else value
        distinct = dict.fromkeys(word for text in texts if (word := text.strip().lower()))
        found |= {(name, word): place for place, word in enumerate(distinct)}
    return sorted(found, key=lambda word: (found[word], word))[:MOST_WORDS]


def _without_blanks(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {name: one for name, one in value.items() if one is not None and one != "" and one != []}


def characters(attributes: Mapping[str, Attribute]) -> int:
    """Of all names and texts together."""
    size = 0
    for name, one in attributes.items():
        size += len(name) + (0 if isinstance(one, float) else len(one) if isinstance(one, str) else sum(map(len, one)))
    return size


def _within_bounds(value: dict[str, Attribute]) -> dict[str, Attribute]:
    size = characters(value)
    if size > MAX_CHARACTERS:
        raise ValueError(f"names and texts have {size} characters together, at most {MAX_CHARACTERS} are read")
    return value


Attributes = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)], Attribute],
    Field(max_length=MOST_ATTRIBUTES),
    BeforeValidator(_without_blanks),
    AfterValidator(_within_bounds),
]
"""By name a text, a list of texts, or a number; null and empty ones count as absent."""
