"""Argument types that commands share."""

from __future__ import annotations

import argparse
from datetime import datetime

from schemas.errors import Misconfigured
from streams.broker.topics import TopicName

ROLES: dict[str, TopicName] = {"index": "items", "record": "behaviours", "train": "behaviours"}


def positive(text: str) -> int:
    """An argument that is a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def share(text: str) -> float:
    """An argument that is a share from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def roles(text: str) -> list[str]:
    """An argument that is a list of roles."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ROLES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ROLES)}")
    return names


def parse_moment(option: str, text: str) -> datetime:
    """A time with a zone. Raises `Misconfigured`."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise Misconfigured(f"{option} {text!r} is not ISO 8601: write it like 2026-09-16T00:00Z") from None
    if moment.tzinfo is None:
        raise Misconfigured(f"{option} {text!r} has no zone: write it like 2026-09-16T00:00Z")
    return moment
