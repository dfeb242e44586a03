"""`mimstream bench`: what this machine reaches. Each benchmark is a module that is imported only when it is called."""

from __future__ import annotations

import argparse
from importlib import import_module

from streams.settings import Settings

BENCHMARKS: dict[str, str] = {
    "encode": "items per second from Kafka records to Milvus rows, against the bare limit of the towers",
    "train": "samples per second of click models from Parquet, beside FuxiCTR's DIN",
    "score": "milliseconds per scored request over HTTP, beside what HTTP and the forward pass cost alone",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their arguments."""
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, summary in BENCHMARKS.items():
        import_module(f"streams.bench.{name}").add_arguments(
            subparsers.add_parser(name, help=summary, description=summary)
        )


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Run the chosen benchmark."""
    return int(import_module(f"streams.bench.{options.benchmark}").run(options, settings))
