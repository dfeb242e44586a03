"""`mimstream topics create|list`."""

from __future__ import annotations

import argparse
import json

from streams.broker.cluster import describe_topics
from streams.broker.topics import TOPICS, create_topics
from streams.runtime.terminal import print_table
from streams.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("action", choices=["create", "list"])
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Create what is missing, or show what is there."""
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
            "exists": name in found.partitions,
            "partitions": len(found.partitions[name]) if name in found.partitions else None,
            "compacted": spec.compacted,
            "purpose": spec.purpose,
        }
        for name, spec in TOPICS.items()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    heads = ("topic", "exists", "partitions", "key", "schema", "compacted", "purpose")
    cells = [
        (
            str(row["topic"]),
            "yes" if row["exists"] else "no",
            str(row["partitions"] or "-"),
            str(row["key"]),
            str(row["schema"]),
            "yes" if row["compacted"] else "no",
            str(row["purpose"]),
        )
        for row in rows
    ]
    print_table(heads, cells)
    return 0
