"""Commands as people call them, without the command line of `mimstream` around."""

from __future__ import annotations

import argparse
from types import ModuleType

from streams.settings import Settings

SETTINGS = Settings()


def call(command: ModuleType, *given: str, to: Settings = SETTINGS) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return int(command.run(parser.parse_args(given), to))
