"""Offsets in a file, for a trainer that begins anew."""

from __future__ import annotations

import json
from pathlib import Path

from schemas.errors import Misconfigured
from schemas.manifests import TopicOffsets


def read_offsets(path: Path) -> TopicOffsets:
    """Offsets of `behaviours` from a JSON file, from a manifest, or from a report. Raises `Misconfigured`.

    A run that begins anew needs every item's vector: the offsets of `embeddings` are not used.
    """
    try:
        held = json.loads(path.read_text())
        held = held.get("offsets", held)
        return {"behaviours": {int(number): int(offset) for number, offset in held["behaviours"].items()}}
    except FileNotFoundError:
        raise Misconfigured(f"offsets file {path} does not exist (--from-offsets)") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise Misconfigured(
            f'{path} (--from-offsets) is not like {{"behaviours": {{"0": 1200, "1": 1170}}}}: {error!r}'
        ) from None
