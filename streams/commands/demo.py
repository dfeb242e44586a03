"""`mimstream demo`: the whole loop on embedded parts, and a report."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from schemas.errors import Misconfigured
from streams.commands.arguments import positive, share
from streams.demo.packaged import DESCRIPTION, open_packaged
from streams.runtime.terminal import say
from streams.settings import Settings
from trainer.datasets.exposures import behaviours_of
from trainer.datasets.folder import NoPictures, open_data_set

DEFAULT_EVENTS = 25_000
"""Takes replayed from the packaged stream, so that a run ends in a few minutes on two cores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="data-set folder (default: the stream that ships with us)"
    )
    parser.add_argument("--events", type=positive, metavar="N", help="keep at most N takes, sampling users whole")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (default: 0)")
    parser.add_argument("--neg-type", default="pop", help="which sampled negatives to show (default: pop)")
    parser.add_argument(
        "--broken", type=share, default=0.01, metavar="SHARE", help="share of broken events (default: 0.01)"
    )
    parser.add_argument(
        "--requests", type=positive, default=25, metavar="N", help="score requests per second (default: 25)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--keep", action="store_true", help="keep the folder with data and logs")
    parser.add_argument(
        "--report", type=Path, default=Path("mimstream-report.html"), metavar="FILE", help="where the HTML report goes"
    )


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Run and report; exit status 1 if something does not add up."""
    from streams.demo.options import DemoOptions
    from streams.demo.report import print_report, write_html
    from streams.demo.run import run_demo  # the demo's parts are not needed to print a help text

    if not options.report.resolve().parent.is_dir():
        raise Misconfigured(f"--report {options.report}: the folder {options.report.resolve().parent} does not exist")
    console = Console(stderr=True)
    if options.data is None:
        data, pictures, events = open_packaged(), DESCRIPTION, options.events or DEFAULT_EVENTS
    else:
        data, events = open_data_set(options.data, neg_type=options.neg_type), options.events
        pictures = "the set has none." if isinstance(data.pictures, NoPictures) else "those of the data set."
    demo = DemoOptions(
        data=data,
        behaviours=behaviours_of(data, seed=options.seed, events=events, retakes=True),
        pictures=pictures,
        seed=options.seed,
        broken_share=options.broken,
        requests_per_second=options.requests,
        sample_items=64,
        config_file=options.config,
    )
    signal.signal(signal.SIGTERM, _stop)
    with ExitStack() as stack:
        if options.keep:
            folder = Path(tempfile.mkdtemp(prefix="mimstream-demo-"))
            stack.callback(lambda: print(f"data and logs are kept in {folder}", file=sys.stderr))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mimstream-demo-")))
        result = run_demo(demo, settings, folder, console)
        write_html(result, data, options.report)
    if options.json:
        print(json.dumps(result.to_json(str(options.report.resolve()))))
    else:
        print_report(result, options.report.resolve(), Console())
    broken = result.broken_promises()
    for one in broken:
        say(f"mimstream demo: does not add up: {one}", error=True)
    return 1 if broken else 0


def _stop(number: int, frame: object) -> None:
    """Leave the way an exception leaves: children are stopped and the folder is removed first."""
    print("mimstream demo: told to stop by SIGTERM", file=sys.stderr)
    sys.exit(128 + number)
