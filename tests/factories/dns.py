"""A DNS of the tests' own: what aiohttp wants to hear from a resolver."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from aiohttp.abc import ResolveResult


def answers(host: str, port: int, addresses: Sequence[str]) -> list[ResolveResult]:
    """These addresses as the answer for a name."""
    return [
        ResolveResult(
            hostname=host,
            host=address,
            port=port,
            family=socket.AF_INET6 if ":" in address else socket.AF_INET,
            proto=0,
            flags=0,
        )
        for address in addresses
    ]
