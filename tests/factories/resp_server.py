"""A server that speaks just enough of the Redis protocol to answer as a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

NO_CLUSTER = b"-ERR This instance has cluster support disabled\r\n"

Answer = Callable[[list[str]], "bytes | Awaitable[bytes]"]


class RespServer:
    """`answer` gets the words of each command. What it does not know (an empty reply) is answered OK."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.accepted = 0
        self.serving: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        try:
            await self._converse(reader, writer)
        finally:
            self.serving.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                words = []
                for _ in range(int((await reader.readline())[1:] or b"0")):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2].decode(errors="replace"))
                if not words:
                    break
                reply = NO_CLUSTER if words[0] == "CLUSTER" else b""
                found = self.answer(words)
                found = found if isinstance(found, bytes) else await found
                writer.write(found or reply or b"+OK\r\n")
                await writer.drain()


@asynccontextmanager
async def resp_server(answer: Answer) -> AsyncIterator[RespServer]:
    here = RespServer(answer)
    server = await asyncio.start_server(here.serve, "127.0.0.1", 0)
    here.port = server.sockets[0].getsockname()[1]
    try:
        yield here
    finally:
        server.close()
        serving = list(here.serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.sleep(0)  # the closed sockets are let go
