"""`mimstream topics create|list`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from streams.broker.cluster import describe_topics
from streams.broker.topics import TOPICS, create_topics
from streams.runtime.terminal import print_table
from streams.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=["create", "list"])
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Create what is missing, or show what is there and what each topic is to be created with."""
    if options.action == "create":
        created = create_topics(settings.kafka, settings.topics)
        print(json.dumps({"created": created}) if options.json else "\n".join(created) or "nothing to create")
        return 0
    found = describe_topics(settings.kafka, settings.topics, TOPICS, missing_ok=True)
    rows = [
        {
            "topic": settings.topics.full_name(name),
            "key": spec.key,
            "schema": spec.schema.__name__ if spec.schema else "original bytes",
            "exists": None if name in found.hidden else name in found.partitions,
            "partitions": len(found.partitions[name]) if name in found.partitions else None,
            "replicas": found.replicas.get(name),
            "wanted": {
                "partitions": spec.partitions(settings.topics),
                "replicas": settings.topics.replication_factor,
                "settings": spec.settings(settings.topics, settings.kafka),
            },
            "compacted": spec.compacted,
            "purpose": spec.purpose,
        }
        for name, spec in TOPICS.items()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    heads = ("topic", "exists", "partitions", "replicas", "to be created with", "key", "schema", "purpose")
    print_table(heads, [_cells(row) for row in rows])
    return 0


def _cells(row: dict[str, Any]) -> Sequence[str]:
    wanted = row["wanted"]
    numbers = {"partitions": wanted["partitions"], "replicas": wanted["replicas"] or "cluster-default"}
    return (
        row["topic"],
        {True: "yes", False: "no", None: "unknown: not visible to this login"}[row["exists"]],
        str(row["partitions"] or "-"),
        str(row["replicas"] or "-"),
        " ".join(f"{name}={value}" for name, value in (numbers | wanted["settings"]).items()),
        row["key"],
        row["schema"],
        row["purpose"],
    )
