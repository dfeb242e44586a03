"""Read the topic `embeddings` to its end: the vector of every item that the center holds now."""

import asyncio
import base64
import json
import os

import numpy as np
from aiokafka import AIOKafkaConsumer  # with cramjam: announcements are compressed with lz4

BROKER = os.environ.get("MIM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:19092")
EMBEDDINGS = os.environ.get("MIM_TOPICS__PREFIX", "mim.") + "embeddings"


async def main() -> None:
    consumer = AIOKafkaConsumer(
        EMBEDDINGS,
        bootstrap_servers=BROKER,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    vectors: dict[tuple[str, str], np.ndarray] = {}
    async with consumer:
        while batch := await consumer.getmany(timeout_ms=5_000):  # until nothing more arrives
            for record in (record for records in batch.values() for record in records):
                encoder_version, _, item_id = record.key.decode().partition(":")
                if record.value is None:
                    vectors.pop((encoder_version, item_id), None)  # the item was deleted
                else:
                    vector = base64.b64decode(json.loads(record.value)["vector"])
                    vectors[encoder_version, item_id] = np.frombuffer(vector, dtype="<f4")
    for (encoder_version, item_id), vector in vectors.items():  # vectors of two versions are not comparable
        print(encoder_version, item_id, vector.shape, "norm", round(float(np.linalg.norm(vector)), 3))


asyncio.run(main())
