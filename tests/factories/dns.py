"""A DNS of the tests' own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence

from aiohttp.abc import AbstractResolver, ResolveResult
from typing_extensions import override


class FakeResolver(AbstractResolver):
    """Answers from a table, and counts; other names are unknown, or asked of the system as `localhost` is."""

    def __init__(self, names: Mapping[str, Sequence[str]], *, ask_system: bool = False) -> None:
        self.names, self.ask_system = dict(names), ask_system
        self.asked: list[str] = []

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        addresses = self.names.get(host.lower().removesuffix("."))
        if addresses is None and not self.ask_system:
            raise OSError(None, "unknown name")
        if addresses is None:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = [str(entry[4][0]) for entry in found]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=_family(address), proto=0, flags=0)
            for address in addresses
        ]

    @override
    async def close(self) -> None: ...


class RebindingResolver(FakeResolver):
    """A name whose addresses are others after the first look."""

    def __init__(self, name: str, first: str, afterwards: str) -> None:
        super().__init__({name: [first]})
        self.name, self.afterwards = name, afterwards

    @override
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        self.names[self.name] = [self.afterwards]
        return found


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
