"""Names of record headers that are not UTF-8.

Brokers accept them, and aiokafka raises `UnicodeDecodeError` at them: its consumer can then never pass the record.
Here a batch with such a name is read again by a slower reader, which escapes the bytes that are no text.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords

_LENGTH = struct.Struct(">i")
_LENGTH_AT, _BATCH_AT = 8, 12


class _Escaping(bytes):
    """Bytes whose slices decode as text with escapes."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _Escaping(found) if isinstance(found, bytes) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)


class _EscapingBatch(_DefaultRecordBatchPy):  # type: ignore[misc]
    _buffer: Any

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        if not isinstance(self._buffer, _Escaping):
            self._buffer = _Escaping(self._buffer)


class _Batch:
    """A batch of aiokafka, and its bytes."""

    def __init__(self, batch: Any, content: memoryview) -> None:
        self._batch = batch
        self._content = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)

    def __iter__(self) -> Iterator[Any]:
        passed = 0
        try:
            for record in self._batch:
                yield record
                passed += 1
        except UnicodeDecodeError:
            yield from islice(_EscapingBatch(bytearray(self._content)), passed, None)


class _Records:
    """The batches of one partition in an answer of the broker."""

    def __init__(self, content: bytes) -> None:
        self._records = MemoryRecords(content)
        self._content = memoryview(content)
        self._at = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def next_batch(self) -> Any:
        batch = self._records.next_batch()
        begin = self._at
        self._at += _BATCH_AT + _LENGTH.unpack_from(self._content, begin + _LENGTH_AT)[0]
        return _Batch(batch, self._content[begin : self._at])


def accept_any_names() -> None:
    """Let all consumers of this process pass such records. Calling it again changes nothing."""
    fetcher.MemoryRecords = _Records
