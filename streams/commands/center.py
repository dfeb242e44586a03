"""`mimstream center verify`."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from encoders.base import Encoder
from schemas.errors import Misconfigured
from streams.center.compare import FAULTS, CenterReport
from streams.center.verify import Progress as OnProgress
from streams.runtime.progress import progress_bar
from streams.settings import Settings
from streams.stores.vectors.collection import read_center
from streams.wiring.center import opened_mender, opened_verification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=["verify"], help="compare the topic items with what the center holds")
    parser.add_argument("--repair", action="store_true", help="mend what differs, through the index path")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Compare, and mend if asked to. Status 1 if something is not as it should be in the end."""
    with progress_bar("reading") as bar:
        report = asyncio.run(_verify(settings, options.repair, lambda what, done, total: bar.set(done, total, what)))
    _tell(report, as_json=options.json)
    return 1 if (report.left if report.repaired else report.faults) else 0


async def _verify(settings: Settings, repair: bool, on_progress: OnProgress) -> CenterReport:
    async def anybody() -> None:
        """No role is needed: what is overwritten by mistake is seen by the look after the write."""

    found = await read_center(settings.milvus)
    async with AsyncExitStack() as opened:
        mender = None
        if repair:
            encoder = await asyncio.to_thread(_load_encoder, settings)
            mender = await opened.enter_async_context(opened_mender(settings, encoder, anybody))
            found = found or await read_center(settings.milvus)
        if found is None:
            raise Misconfigured(
                f"nothing was ever indexed behind Milvus alias {settings.milvus.alias!r} (MIM_MILVUS__ALIAS): run "
                "'mimstream index', or 'mimstream center verify --repair'"
            )
        async with opened_verification(settings, found, mender, on_progress) as verification:
            return await verification.run()


def _load_encoder(settings: Settings) -> Encoder:
    from encoders.loading import load_encoder  # torch and the towers: seconds that only a repair needs

    return load_encoder(settings.encoder)


def as_object(report: CenterReport) -> dict[str, Any]:
    """The report as one object."""
    plain = asdict(replace(report, found=Counter(), examples=[]))
    del plain["found"]
    plain["faults"] = report.faults
    plain |= {fault: report.found[fault] for fault in FAULTS}
    plain["examples"] = [asdict(one) for one in report.examples]
    return plain


def _tell(report: CenterReport, *, as_json: bool) -> None:
    whole = as_object(report)
    if as_json:
        print(json.dumps(whole, indent=2))
        return
    table = Table("fault", "item", "record", "detail")
    for one in report.examples:
        record = "-" if one.offset is None else f"{one.partition}/{one.offset}"
        table.add_row(one.fault, one.item_id, record, one.detail)
    if report.examples:
        Console().print(table)
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in whole.items() if name != "examples"))
