"""`mimstream import DIR`: publish the items of a data-set folder, without behaviours."""

from __future__ import annotations

import argparse

from streams.commands.replay import add_shared_arguments, publish
from streams.settings import Settings
from trainer.datasets.folder import open_data_set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_shared_arguments(parser)


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Publish the items and print how many."""
    return publish(options, settings, open_data_set(options.folder, behaviours=False), None)
