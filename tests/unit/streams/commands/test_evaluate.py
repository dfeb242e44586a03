"""What `mimstream evaluate` refuses before it looks at a folder."""

from __future__ import annotations

import argparse

import pytest

from schemas.errors import Misconfigured
from streams.commands import evaluate
from streams.settings import Settings


@pytest.mark.parametrize(
    ("protocol", "given"),
    [
        ("live", ("--models", "ciubm")),
        ("live", ("--seeds", "3")),
        ("live", ("--labels", "ratings")),
        ("time-split", ("--seed", "0")),
        ("prequential", ("--events", "100")),
        ("time-split", ("--limit", "100")),
        ("time-split", ("--broken", "0")),
        ("time-split", ("--against", "before")),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else given,
)
def test_an_option_that_the_protocol_does_not_look_at_is_refused(protocol: str, given: tuple[str, str]) -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    options = parser.parse_args(["no such folder", "--protocol", protocol, *given])
    with pytest.raises(Misconfigured, match=f"{given[0]} does not go with --protocol {protocol}"):
        evaluate.run(options, Settings())
