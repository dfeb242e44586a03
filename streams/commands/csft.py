"""`mimstream csft`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from streams.commands.arguments import positive, share
from streams.runtime.extras import require_package
from streams.runtime.terminal import say
from streams.settings import Settings
from trainer.csft.config import CsftConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="data-set folder (default: the topics)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the bundle here (default: MIM_ENCODERS__FOLDER)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="passes over the pairs (MIM_CSFT__EPOCHS)")
    parser.add_argument("--log-q", type=share, metavar="SHARE", help="sampling correction (MIM_CSFT__LOG_Q_STRENGTH)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of every random choice (MIM_CSFT__SEED)")
    parser.add_argument("--scl", action="store_true", help="SCL of Taobao display instead of C-SFT")
    parser.add_argument("--test", action="store_true", help="also report the folder's test span (look once)")
    parser.add_argument("--dry-run", action="store_true", help="train and report, write no bundle")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Train an encoder and write its bundle; exit status 1 if the space collapsed."""
    from streams.wiring.encoder_training import run_csft  # torch is not needed to print a help text

    if settings.tuning.layers == "lora":
        require_package("peft", "MIM_TUNING__LAYERS=lora")
    config = configured(options, settings.csft)
    started = time.monotonic()
    report = run_csft(settings, config, options.data, options.out, with_test=options.test, dry_run=options.dry_run)
    report["wall_seconds"] = round(time.monotonic() - started, 1)
    if options.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 1 if report["collapse"] else 0


def configured(options: argparse.Namespace, config: CsftConfig) -> CsftConfig:
    """Settings with the options on top."""
    given = {"epochs": options.epochs, "log_q_strength": options.log_q, "seed": options.seed}
    changed = config.model_copy(update={name: value for name, value in given.items() if value is not None})
    return changed.as_scl() if options.scl else changed


def _print(report: dict[str, Any]) -> None:
    from trainer.offline.encoder_report import table

    say(f"{report['data']}: {report['pairs']:,} pairs, {report['steps']:,} steps, {report['wall_seconds']:.0f} s")
    no_pair = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in report["no_pair"].items() if count]
    if no_pair:
        say(f"takes that made no pair: {', '.join(no_pair)}")
    for span in ("validation", "test"):
        if span in report:
            print(f"\n{span}\n{table(report[span])}")
            geometry = report[span]["geometry"]
            print(
                f"mean pairwise cosine {geometry['mean_pairwise_cosine']:.3f}, "
                f"effective rank {geometry['effective_rank']:.0f}, uniformity {geometry['uniformity']:.2f}"
            )
    if report["collapse"]:
        say(f"\nNOT RELEASED: {report['collapse']}")
    elif report["bundle"]:
        say(f"\n{report['encoder_version']} in {report['bundle']}\nuse it: MIM_ENCODER__BUNDLE={report['bundle']}")
