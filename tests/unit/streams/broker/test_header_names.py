"""Header names that are not UTF-8 stop no consumer."""

from __future__ import annotations

import gzip
import struct

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from streams.broker.header_names import accept_any_names

NOT_TEXT = b"\xff\xfe\xfd\xfc"
CHECKED, RECORDS = 21, 61
"""Where the part of a batch begins that its checksum covers, and where its records begin."""


def batch(first_offset: int, name: bytes, *, packed: bool) -> bytes:
    """Three records; the second has headers, one of this name (four bytes)."""
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 10_000)
    for number in range(3):
        builder.append(number, 1, b"k%d" % number, b"{", [("name", b"x"), ("empty", None)] if number == 1 else [])
    content = bytearray(bytes(builder.build()).replace(b"name", name))
    content[:8] = struct.pack(">q", first_offset)
    if packed:
        content[CHECKED : CHECKED + 2] = struct.pack(">h", 1)  # gzip
        content[RECORDS:] = gzip.compress(bytes(content[RECORDS:]), mtime=0)
        content[8:12] = struct.pack(">i", len(content) - 12)
    content[17:CHECKED] = struct.pack(">I", calc_crc32c(bytes(content[CHECKED:])))
    return bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_a_consumer_passes_a_record_with_a_header_name_that_is_no_text(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "MemoryRecords", fetcher.MemoryRecords)  # and put back
    accept_any_names()
    names = (b"name", NOT_TEXT, b"name")
    content = b"".join(batch(3 * number, name, packed=packed) for number, name in enumerate(names))
    records = fetcher.PartitionRecords(
        TopicPartition("items", 0), fetcher.MemoryRecords(content), [], 0, None, None, True, fetcher.READ_COMMITTED
    )
    found = list(records)
    assert [(record.offset, record.key) for record in found] == [(n, b"k%d" % (n % 3)) for n in range(9)]
    read_as = ("name", "\\xff\\xfe\\xfd\\xfc", "name")
    assert [list(record.headers) for record in found[1::3]] == [[(name, b"x"), ("empty", None)] for name in read_as]
    assert records.next_fetch_offset == 9
