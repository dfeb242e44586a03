"""Opening what the index path works with, and what checks it: shared by `mimstream index` and `mimstream center`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta

from encoders.base import Encoder
from streams.broker.clients import broker_errors, make_producer
from streams.broker.topics import DEAD_LETTER_HEADROOM_BYTES
from streams.center.repair import RecordDecoding, Repairer
from streams.center.verify import CenterVerification
from streams.center.verify import Progress as OnProgress
from streams.dead_letters.producer import KafkaDeadLetters
from streams.indexing.announcements import KafkaOutbox
from streams.indexing.context import Guard, IndexContext
from streams.indexing.encoding import ItemEncoding
from streams.indexing.image_fetch import ImageFetcher
from streams.runtime.delivery import Patience
from streams.settings import Settings
from streams.stores.vectors.collection import CollectionInfo
from streams.stores.vectors.milvus_index import MilvusItemIndex, collection_name
from streams.stores.vectors.row_scan import MilvusRowScan


@asynccontextmanager
async def opened_center(settings: Settings, encoder: Encoder) -> AsyncIterator[IndexContext]:
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
            fetch=fetcher.fetch,
            config=config,
            max_record_bytes=settings.kafka.max_record_bytes,
            patience=Patience(config.back_off),
            now=lambda: datetime.now(UTC),
        )


@asynccontextmanager
async def opened_mender(settings: Settings, encoder: Encoder, guard: Guard) -> AsyncIterator[Repairer]:
    """What mends the center; `guard` is asked before each write."""
    current = collection_name(settings.milvus.alias, encoder.version)
    async with opened_center(settings, encoder) as center:
        yield Repairer(center, guard, _reading(settings), lambda version: _is(settings, version, current))


@asynccontextmanager
async def opened_verification(
    settings: Settings,
    center: CollectionInfo,
    mender: Repairer | None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> AsyncIterator[CenterVerification]:
    """A comparison of the topic with `center`."""
    # to read rows their encoder need not be known
    rows = MilvusItemIndex(settings.milvus, encoder_version=center.encoder_version or "reader", dim=center.dim)
    try:
        async with CenterVerification(
            settings.kafka,
            settings.topics,
            rows,
            MilvusRowScan(settings.milvus),
            _reading(settings),
            is_current=lambda version: _is(settings, version, center.name),
            mender=mender,
            on_progress=on_progress,
        ) as verification:
            yield verification
    finally:
        await rows.close()


def _is(settings: Settings, version: str, collection: str) -> bool:
    return collection_name(settings.milvus.alias, version) == collection


def _reading(settings: Settings) -> RecordDecoding:
    """How records of `items` are decoded."""
    return RecordDecoding(
        max_record_bytes=settings.kafka.max_record_bytes,
        field_map=settings.index.field_map,
        max_ahead=timedelta(seconds=settings.index.max_ahead_seconds),
    )


def _share_cores(settings: Settings) -> int:
    """How many passes run side by side. Torch is told to use as many cores for each as that leaves."""
    import torch  # loaded with the encoder

    cores = torch.get_num_threads()
    wanted = settings.index.encode_threads or (cores if settings.encoder.device == "cpu" else 1)
    torch.set_num_threads(max(1, cores // wanted))
    return wanted
