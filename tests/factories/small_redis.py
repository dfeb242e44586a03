"""As much of Redis as the stores use, in this process: keys with types and times, optimistic transactions, scripts.

A script is done by a function of the same effect, so what a script says is tested against a real server alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from fnmatch import fnmatchcase
from typing import Any

from streams.indexing import slots
from streams.stores.histories import deleted_items, erasure_marks, redis_store
from streams.stores.histories.packed_history import packed_items

Words = list[bytes]


class SmallRedis:
    """The data of a server."""

    def __init__(self) -> None:
        self.values: dict[bytes, Any] = {}
        self.ends: dict[bytes, float] = {}
        self.writes: dict[bytes, int] = {}
        self.numbers: dict[bytes, int] = {}
        """Of each key that ever was, so that a scan passes over none because another one goes."""
        self._scripts: dict[str, Callable[[Words, Words], Any]] = {
            redis_store._SET_ALL: self._set_all,
            erasure_marks._DROP: self._drop,
            deleted_items._FIND: self._find,
            deleted_items._SWAP: self._swap,
            deleted_items._LEAD: self._lead,
            deleted_items._RESIGN: self._release,
            slots._RENEW: self._renew,
            slots._RELEASE: self._release,
        }

    # ---- keys --------------------------------------------------------------------------------------------------------

    def get(self, key: bytes) -> Any:
        if self.ends.get(key, float("inf")) <= time.monotonic():
            self.remove(key)
        return self.values.get(key)

    def put(self, key: bytes, value: Any, *, seconds: float | None = None, keeps_time: bool = False) -> None:
        if value in ({}, set()):
            self.remove(key)
            return
        self.values[key] = value
        if not keeps_time:
            self.ends.pop(key, None)
        if seconds is not None:
            self.ends[key] = time.monotonic() + seconds
        self.numbers.setdefault(key, len(self.numbers) + 1)
        self.writes[key] = self.writes.get(key, 0) + 1

    def remove(self, key: bytes) -> int:
        self.writes[key] = self.writes.get(key, 0) + 1
        self.ends.pop(key, None)
        return int(self.values.pop(key, None) is not None)

    def part(self, key: bytes, of: type) -> Any:
        return of(self.get(key) or of())

    def keys(self) -> list[bytes]:
        return sorted((key for key in list(self.values) if self.get(key) is not None), key=self.numbers.__getitem__)

    # ---- commands ----------------------------------------------------------------------------------------------------

    def do(self, name: str, given: Words) -> Any:
        key = given[0] if given else b""
        match name:
            case "PING" | "SELECT" | "AUTH" | "CLIENT":
                return "OK" if name != "PING" else "PONG"
            case "GET":
                return self.get(key)
            case "MGET":
                return [self.get(one) for one in given]
            case "EXISTS":
                return sum(self.get(one) is not None for one in given)
            case "DEL" | "UNLINK":
                return sum(self.remove(one) for one in given)
            case "KEYS":
                return [one for one in self.keys() if _matches(one, key)]
            case "SCAN":
                return self._scan(int(key), *given[2::2])
            case "EXPIRE":
                self.put(key, self.get(key), seconds=int(given[1]))
                return 1
            case "TTL" | "PTTL":
                left = self.ends.get(key, 0.0) - time.monotonic()
                return round(left * (1_000 if name == "PTTL" else 1)) if self.get(key) is not None else -2
            case "SET":
                return self._set(key, given[1], [word.upper() for word in given[2:]])
            case "EVAL":
                count = int(given[1])
                return self._scripts[key.decode()](given[2 : 2 + count], given[2 + count :])
            case _ if name.startswith("H"):
                return self._of_hash(name, key, given[1:])
            case _ if name.startswith("Z"):
                return self._of_scores(name, key, given[1:])
            case "SADD":
                self.put(key, self.part(key, set) | set(given[1:]), keeps_time=True)
                return 1
            case "SMEMBERS":
                return list(self.part(key, set))
        raise AssertionError(f"{name} is not done here")

    def _scan(self, cursor: int, pattern: bytes, count: bytes) -> list[Any]:
        left = [key for key in self.keys() if self.numbers[key] >= cursor]
        page, rest = left[: int(count)], left[int(count) :]
        after = self.numbers[rest[0]] if rest else 0
        return [b"%d" % after, [key for key in page if _matches(key, pattern)]]

    def _set(self, key: bytes, value: bytes, options: Words) -> str | None:
        if b"NX" in options and self.get(key) is not None:
            return None
        seconds = int(options[options.index(b"PX") + 1]) / 1_000 if b"PX" in options else None
        self.put(key, value, seconds=seconds)
        return "OK"

    def _of_hash(self, name: str, key: bytes, given: Words) -> Any:
        held = self.part(key, dict)
        match name:
            case "HGET":
                return held.get(given[0])
            case "HMGET":
                return [held.get(field) for field in given]
            case "HGETALL":
                return held
            case "HSCAN":
                return [b"0", [word for pair in held.items() for word in pair]]
            case "HSET":
                held |= dict(zip(given[::2], given[1::2], strict=True))
            case "HINCRBY":
                held[given[0]] = b"%d" % (int(held.get(given[0], 0)) + int(given[1]))
            case "HDEL":
                count = sum(held.pop(field, None) is not None for field in given)
                self.put(key, held, keeps_time=True)
                return count
        self.put(key, held, keeps_time=True)
        return 1

    def _of_scores(self, name: str, key: bytes, given: Words) -> Any:
        held: dict[bytes, float] = self.part(key, dict)
        match name:
            case "ZCARD":
                return len(held)
            case "ZMSCORE":
                return [held.get(one) for one in given]
            case "ZADD":
                held |= {member: float(score) for score, member in zip(given[::2], given[1::2], strict=True)}
            case "ZREM":
                held = {member: score for member, score in held.items() if member not in given}
            case "ZREMRANGEBYSCORE":
                assert given[0] == b"-inf" and given[1].startswith(b"(")
                held = {member: score for member, score in held.items() if score >= float(given[1][1:])}
        self.put(key, held, keeps_time=True)
        return 1

    # ---- scripts -----------------------------------------------------------------------------------------------------

    def _set_all(self, keys: Words, given: Words) -> None:
        for key, value in zip(keys, given[1:], strict=True):
            self.put(key, value, seconds=int(given[0]))

    def _drop(self, keys: Words, given: Words) -> int:
        held, pairs = self.part(keys[0], dict), zip(given[::2], given[1::2], strict=True)
        dropped = [field for field, value in pairs if held.get(field) == value]
        return int(self._of_hash("HDEL", keys[0], dropped)) if dropped else 0

    def _find(self, keys: Words, given: Words) -> list[Any]:
        marks, found = self.part(keys[0], dict), []
        for key in keys[1:]:
            packed = self.get(key)
            marked = [item.encode() for item in packed_items(packed) if item.encode() in marks]
            if marked:
                found.append([key, packed, marked])
        return found

    def _swap(self, keys: Words, given: Words) -> list[int]:
        swapped = [self.get(key) == before for key, before in zip(keys, given[::2], strict=True)]
        for key, after, done in zip(keys, given[1::2], swapped, strict=True):
            if done and after:
                self.put(key, after, keeps_time=True)
            elif done:
                self.remove(key)
        return [int(done) for done in swapped]

    def _lead(self, keys: Words, given: Words) -> int:
        if self.get(keys[0]) not in (None, given[0]):
            return 0
        self.put(keys[0], given[0], seconds=int(given[1]) / 1_000)
        return 1

    def _renew(self, keys: Words, given: Words) -> int:
        return self._lead(keys, given)

    def _release(self, keys: Words, given: Words) -> int:
        return self.remove(keys[0]) if self.get(keys[0]) == given[0] else 0


def _matches(key: bytes, pattern: bytes) -> bool:
    return fnmatchcase(key.decode("latin-1"), pattern.decode("latin-1"))


class _Connection:
    """What one client has watched and queued."""

    def __init__(self, data: SmallRedis) -> None:
        self.data = data
        self.watched: dict[bytes, int] = {}
        self.queued: list[tuple[str, Words]] | None = None

    def answer(self, name: str, given: Words) -> bytes:
        if name == "HELLO":
            return _packed({b"proto": 3})
        if name == "CLUSTER":
            return b"-ERR This instance has cluster support disabled\r\n"
        if name == "WATCH":
            for key in given:
                self.data.get(key)
                self.watched[key] = self.data.writes.get(key, 0)
        elif name == "UNWATCH":
            self.watched.clear()
        elif name == "MULTI":
            self.queued = []
        elif name == "DISCARD":
            self.watched, self.queued = {}, None
        elif name == "EXEC":
            return _packed(self._execute())
        elif self.queued is not None:
            self.queued.append((name, given))
            return b"+QUEUED\r\n"
        else:
            return _packed(self.data.do(name, given))
        return b"+OK\r\n"

    def _execute(self) -> list[Any] | None:
        queued, watched = self.queued or [], self.watched
        self.watched, self.queued = {}, None
        if any(self.data.writes.get(key, 0) != write for key, write in watched.items()):
            return None
        return [self.data.do(name, given) for name, given in queued]


def _packed(answer: Any) -> bytes:
    if isinstance(answer, list):
        return b"*%d\r\n" % len(answer) + b"".join(map(_packed, answer))
    if isinstance(answer, dict):
        return b"%%%d\r\n" % len(answer) + b"".join(_packed(word) for pair in answer.items() for word in pair)
    if isinstance(answer, float):
        return f",{answer!r}\r\n".encode()
    if isinstance(answer, int):
        return b":%d\r\n" % answer
    if isinstance(answer, str):
        return f"+{answer}\r\n".encode()
    return b"$-1\r\n" if answer is None else b"$%d\r\n%s\r\n" % (len(answer), answer)


@asynccontextmanager
async def small_redis() -> AsyncIterator[str]:
    """The address of a server without data; it lives in this event loop."""
    data, serving = SmallRedis(), set[asyncio.Task[None] | None]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        connection = _Connection(data)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readline():
                words = []
                for _ in range(int(head[1:])):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2])
                writer.write(connection.answer(words[0].decode().upper(), words[1:]))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    finally:
        server.close()
        for task in serving:
            assert task is not None
            task.cancel()
        await asyncio.gather(*[task for task in serving if task is not None], return_exceptions=True)
        await asyncio.sleep(0)
