"""Every decoder of untrusted bytes, and the errors that it may raise."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from pydantic import ValidationError

from encoders.base import ItemContent
from encoders.bundle import DEFAULT_BUNDLE, BundleManifest, read_bundle
from encoders.preprocess import ImageLimits, decode_image, join_text
from schemas.base import Message, decode
from schemas.behaviours import Behaviour
from schemas.errors import BadMessage, EncodingFailed, Misconfigured, Reason, StoreUnavailable
from schemas.field_maps import FieldMap
from schemas.forgotten import ForgottenUser
from schemas.items import ImageRetry, ItemEmbedding, ItemPublished, parse_embedding_key
from schemas.letters import DeadLetter, Handled, RequeueHeaders
from schemas.manifests import ModelManifest, ReleaseNotice
from schemas.queries import QueryEmbedding, parse_query_key
from schemas.scoring import ScoreRequest, SimilarRequest
from streams.broker.records import SourceRecord, read_batch, read_forgotten, read_item_id
from streams.dead_letters.inbox import DeadLetterIndex
from streams.recording.deleted_items import read_states
from streams.stores.histories.packed_history import UserTakes, pack_takes, unpack_takes
from streams.stores.vectors.item_index import ItemRow
from streams.stores.vectors.milvus_index import from_milvus, to_milvus
from tests.fuzz.records import BEHAVIOUR_MAP, ITEM_MAP, read_everywhere
from tests.fuzz.snapshots import CORPUS_OF, with_file
from tests.fuzz.states import read_skew, read_state, read_state_key

NOW = datetime(2026, 5, 1, tzinfo=UTC)
MAX_BYTES = 1_000_000
LIMITS = ImageLimits(max_bytes=2_000_000, max_pixels=4_000_000)


@dataclass(frozen=True)
class Target:
    """One decoder."""

    name: str
    run: Callable[[bytes], object]
    """Accepts any bytes; returns or raises an expected error."""
    expected: tuple[type[Exception], ...]
    binary: bool = False
    """Whether its input is not text."""

    def feed(self, data: bytes) -> None:
        """Run on one input; unexpected errors are raised."""
        with suppress(*self.expected):
            self.run(data)


def _item(data: bytes, field_map: FieldMap | None = None) -> None:
    item = decode(ItemPublished, data, now=NOW, max_bytes=MAX_BYTES, field_map=field_map)
    join_text(ItemContent.of(item, None), max_characters=2_000)
    row = ItemRow(
        item_id=item.item_id, encoder_version="e1", vector=np.zeros(4, np.float32), content_hash=item.content_hash(),
        published_at=item.published_at, category=item.category or None, price=item.price, first_price=item.price,
        has_title=bool(item.title), has_image=False, source_partition=0, source_offset=0, produced_at_ms=0,
        title=item.title[:500],
    )  # fmt: skip
    back = from_milvus(to_milvus(row))
    assert (back.item_id, back.published_at, back.price) == (row.item_id, row.published_at, row.price)
    ItemPublished.model_validate_json(item.model_dump_json())


def _behaviour(data: bytes, field_map: FieldMap | None = None) -> None:
    behaviour = decode(Behaviour, data, now=NOW, max_bytes=MAX_BYTES, field_map=field_map)
    user, back = UserTakes(), UserTakes()
    user.observe(behaviour, length=10, remembered=10)
    unpack_takes(pack_takes(user), back)
    assert back.history() == user.history()
    Behaviour.model_validate_json(behaviour.model_dump_json())


def _message(model: type[Message]) -> Callable[[bytes], object]:
    return lambda data: decode(model, data, now=NOW, max_bytes=MAX_BYTES).model_dump_json()


def _embedding(data: bytes) -> None:
    embedding = decode(ItemEmbedding, data, now=NOW, max_bytes=MAX_BYTES)
    assert len(np.frombuffer(embedding.vector, "<f4")) == embedding.dim


def _requests(data: bytes) -> None:
    for model in (ScoreRequest, SimilarRequest):
        try:
            model.model_validate_json(data)
        except ValidationError as error:
            error.errors(include_url=False, include_input=False, include_context=False)


def _pairs(data: bytes) -> list[tuple[str, bytes | None]]:
    """Lines of `name=value` as headers of a record; a line without `=` is a header without a value."""
    pairs = (line.partition(b"=") for line in data.split(b"\n"))
    return [(name.decode("latin-1"), value if equals else None) for name, equals, value in pairs]


def _letter(data: bytes) -> None:
    headers = _pairs(data)
    Handled.from_record(data[:20], headers)
    letter = DeadLetter.from_record(data, headers)
    assert DeadLetter.from_record(data, letter.headers()).letter_key == letter.letter_key


def _headers(data: bytes) -> None:
    """Headers of any producer on every topic that is read: nothing is raised, and what is made of them is readable."""
    headers = _pairs(data)
    record = SourceRecord("items", 0, 1, 0, data[:20], data, tuple(headers))
    letter = record.letter("decode", BadMessage(Reason.NOT_JSON, "detail"), failed_at=NOW)
    assert DeadLetter.from_record(data, letter.headers()) == letter
    again = RequeueHeaders.from_headers(headers)
    if again is not None:
        assert RequeueHeaders.from_headers(again.headers()) == again
        retry = ImageRetry.model_validate(
            {
                "item": {"item_id": "i", "title": "t", "published_at": NOW},
                "source": {"partition": 0, "offset": 1},
                "attempt": 1,
                "not_before": NOW,
                "requeued_from": again.letter_key.decode(),
                "failed_before": again.attempts,
                "first_failed_at": again.first_failed_at,
            }
        )
        assert ImageRetry.model_validate_json(retry.model_dump_json()) == retry
    index = DeadLetterIndex()
    index.add(key=data[:20], value=data, headers=headers, at=(0, 0))
    index.add(key=None, value=None, headers=headers, at=(0, 1))
    index.add(key=letter.letter_key, value=data, headers=letter.headers(), at=(0, 2))
    assert len(index.entries()) >= 1


def _item_key(data: bytes) -> None:
    with suppress(BadMessage):
        read_item_id(data)
    record = SourceRecord("items", 0, 1, 0, data, b"{")
    for value in (None, b"{"):
        read_states([SimpleNamespace(key=data, value=value, timestamp=int.from_bytes(data[:8], "big"))], now=0.0)
    events, letters = read_batch([record_of(data, b"{")], now=NOW, max_bytes=MAX_BYTES)
    assert (events[0].behaviour, letters[0].key) == (None, data)
    assert not read_forgotten([record_of(data, b'{"user_id":"u"}')], max_bytes=MAX_BYTES)
    letter = record.letter("decode", BadMessage(Reason.NOT_JSON, "detail"), failed_at=NOW)
    assert DeadLetter.from_record(b"{", letter.headers()) == letter


def record_of(key: bytes, value: bytes) -> SimpleNamespace:
    """A record of a Kafka client."""
    return SimpleNamespace(partition=0, offset=1, timestamp=0, key=key, value=value, headers=[("attempts", None)])


def _picture(data: bytes) -> None:
    pixels = decode_image(data, size=32, limits=LIMITS)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)


def _bundle(name: str) -> Callable[[bytes], None]:
    """Read the default bundle with one file replaced and its checksum corrected."""
    whole = {path.name: path.read_bytes() for path in DEFAULT_BUNDLE.iterdir() if path.is_file()}
    assert name in whole
    summed = [line.partition("  ")[2] for line in whole[SUMS].decode().splitlines()]

    def run(data: bytes) -> None:
        files = whole | {name: data}
        if name == FUSION:
            files[MANIFEST] = _addressed(whole[MANIFEST], hashlib.sha256(data).hexdigest())
        if name != SUMS:
            sums = (f"{hashlib.sha256(files[each]).hexdigest()}  {each}" for each in summed)
            files[SUMS] = "\n".join(sums).encode()
        with tempfile.TemporaryDirectory() as folder:
            for file_name, content in files.items():
                (Path(folder) / file_name).write_bytes(content)
            read_bundle(Path(folder))

    return run


def _addressed(manifest: bytes, fusion_sha256: str) -> bytes:
    plain = json.loads(manifest)
    plain["fusion"]["sha256"] = fusion_sha256
    made = BundleManifest.model_validate(plain)
    return made.model_copy(update={"version": made.address()}).model_dump_json().encode()


SUMS, MANIFEST, FUSION = "SHA256SUMS", "bundle.json", "fusion.safetensors"

TARGETS = {
    target.name: target
    for target in (
        Target("items", _item, (BadMessage,)),
        Target("items-by-map", partial(_item, field_map=ITEM_MAP), (BadMessage,)),
        Target("behaviours", _behaviour, (BadMessage,)),
        Target("behaviours-by-map", partial(_behaviour, field_map=BEHAVIOUR_MAP), (BadMessage,)),
        Target("forgotten", _message(ForgottenUser), (BadMessage,)),
        Target("records", read_everywhere, (), binary=True),
        Target("items-retry", _message(ImageRetry), (BadMessage,)),
        Target("embeddings", _embedding, (BadMessage,)),
        Target("queries", _message(QueryEmbedding), (BadMessage,)),
        Target("models", _message(ReleaseNotice), (BadMessage,)),
        Target("manifest", ModelManifest.model_validate_json, (ValidationError,)),
        Target("requests", _requests, ()),
        Target("letters", _letter, (KeyError, ValueError), binary=True),
        Target("headers", _headers, (), binary=True),
        Target("item-keys", _item_key, (), binary=True),
        Target("embedding-keys", parse_embedding_key, (ValueError,), binary=True),
        Target("query-keys", parse_query_key, (ValueError,), binary=True),
        Target("item-states", read_state, (), binary=True),
        Target("state-keys", read_state_key, (ValueError,), binary=True),
        Target("skew", read_skew, ()),
        Target("pictures", _picture, (EncodingFailed,), binary=True),
        Target("bundle-manifest", _bundle(MANIFEST), (Misconfigured,)),
        Target("bundle-sums", _bundle(SUMS), (Misconfigured,)),
        Target("bundle-fusion", _bundle(FUSION), (Misconfigured,), binary=True),
        *(
            Target(corpus, with_file(file), (Misconfigured, StoreUnavailable), binary=file.endswith(".safetensors"))
            for file, corpus in CORPUS_OF.items()
        ),
    )
}
