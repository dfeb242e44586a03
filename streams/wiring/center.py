"""Wiring of the index path, verification and repair: shared by `mimstream index` and `mimstream center`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

from encoders.base import Encoder
from schemas.errors import Misconfigured
from streams.broker.clients import broker_errors, make_producer
from streams.broker.log_reader import LogReader
from streams.broker.topics import DEAD_LETTER_HEADROOM_BYTES, TOPICS
from streams.center.compare import CenterReport
from streams.center.newest_records import OnProgress
from streams.center.repair import RecordDecoding, Repairer
from streams.center.verify import CenterVerification
from streams.dead_letters.producer import KafkaDeadLetters
from streams.indexing.announcements import KafkaOutbox
from streams.indexing.context import Guard, IndexContext
from streams.indexing.encoding import ItemEncoding
from streams.indexing.image_fetch import ImageFetcher
from streams.runtime.delivery import Patience
from streams.settings import Settings
from streams.stores.vectors.collection import CollectionInfo, read_center
from streams.stores.vectors.milvus_index import MilvusItemIndex, collection_name
from streams.stores.vectors.row_scan import MilvusRowScan


@asynccontextmanager
async def open_index_context(settings: Settings, encoder: Encoder) -> AsyncIterator[IndexContext]:
    """The center with everything that writes to it. Sets it up if it does not exist; refuses another encoder's."""
    config = settings.index
    async with AsyncExitStack() as opened:
        index = MilvusItemIndex(settings.milvus, encoder_version=encoder.version, dim=encoder.dim)
        opened.push_async_callback(index.close)
        await index.open()
        producer = make_producer(
            settings.kafka,
            max_request_size=settings.kafka.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES,
            linger_ms=0,  # what lies here when the process is stopped is sent when it goes on, after its successor's
        )
        opened.push_async_callback(producer.stop)
        with broker_errors(settings.kafka):
            await producer.start()
        encoding = ItemEncoding(
            encoder,
            prepare_threads=config.prepare_threads,
            encode_threads=_share_cores(settings),
            cache_items=config.cache_items,
        )
        opened.callback(encoding.close)
        fetcher = await opened.enter_async_context(ImageFetcher(settings.images))
        yield IndexContext(
            index=index,
            outbox=KafkaOutbox(producer, settings.kafka, settings.topics, encoder_version=encoder.version),
            dead_letters=KafkaDeadLetters(producer, settings.kafka, settings.topics),
            encoding=encoding,
            fetch=fetcher.picture,
            config=config,
            max_record_bytes=settings.kafka.max_record_bytes,
            behaviours_map=settings.record.field_map,
            patience=Patience(config.back_off),
            now=lambda: datetime.now(UTC),
            deletions_kept=timedelta(hours=settings.topics.tombstone_retention_hours),
        )


async def verify_center(settings: Settings, *, repair: bool, on_progress: OnProgress) -> CenterReport:
    """Compare the topic with the center behind the alias, and repair if asked to."""
    found = await read_center(settings.milvus)
    encoder = await asyncio.to_thread(_load_encoder, settings) if repair else None
    return await run_verification(settings, found, encoder, _always_allowed, on_progress)


async def run_verification(
    settings: Settings, found: CollectionInfo | None, encoder: Encoder | None, guard: Guard, on_progress: OnProgress
) -> CenterReport:
    """Compare the topic with the collection that was `found`; repair with an encoder, `guard` before each write.

    Raises `Misconfigured` if nothing was ever indexed and there is no encoder to begin with.
    """
    async with AsyncExitStack() as opened:
        repairer = None
        if encoder is not None:
            current = collection_name(settings.milvus.alias, encoder.version)
            context = await opened.enter_async_context(open_index_context(settings, encoder))
            repairer = Repairer(context, guard, _decoding(settings), partial(_is_version_of, settings, current))
            found = found or await read_center(settings.milvus)
        if found is None:
            raise Misconfigured(
                f"nothing was ever indexed behind Milvus alias {settings.milvus.alias!r} (MIM_MILVUS__ALIAS): run "
                "'mimstream index', or 'mimstream center verify --repair'"
            )
        # reading rows needs no encoder
        rows = MilvusItemIndex(settings.milvus, encoder_version=found.encoder_version or "reader", dim=found.dim)
        opened.push_async_callback(rows.close)
        verification = CenterVerification(
            await opened.enter_async_context(LogReader(settings.kafka, settings.topics)),
            await opened.enter_async_context(LogReader(settings.kafka, settings.topics)),
            partial(rows.fetch, pending=True),
            MilvusRowScan(settings.milvus),
            _decoding(settings),
            is_current=partial(_is_version_of, settings, found.name),
            retries_since=datetime.now(UTC) - timedelta(milliseconds=int(TOPICS["items-retry"].extra["retention.ms"])),
            repairer=repairer,
            on_progress=on_progress,
        )
        return await verification.run()


async def _always_allowed() -> None:
    """A repair needs no slot: what it overwrites by mistake is seen when the log is read again after the write."""


def _load_encoder(settings: Settings) -> Encoder:
    from encoders.loading import load_encoder  # torch and the towers: seconds that only a repair needs

    return load_encoder(settings.encoder)


def _is_version_of(settings: Settings, collection: str, version: str) -> bool:
    return collection_name(settings.milvus.alias, version) == collection


def _decoding(settings: Settings) -> RecordDecoding:
    return RecordDecoding(
        max_record_bytes=settings.kafka.max_record_bytes,
        field_map=settings.index.field_map,
        max_ahead=timedelta(seconds=settings.index.max_ahead_seconds),
        outcomes=settings.index.outcomes,
    )


def _share_cores(settings: Settings) -> int:
    """How many passes run side by side. Torch is set to use as many cores for each as that leaves."""
    import torch  # loaded with the encoder

    cores = torch.get_num_threads()
    wanted = settings.index.encode_threads or (cores if settings.encoder.device == "cpu" else 1)
    torch.set_num_threads(max(1, cores // wanted))
    return wanted
