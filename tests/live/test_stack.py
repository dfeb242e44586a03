"""The embedded stack keeps its data through kills."""

from aiokafka import AIOKafkaProducer

from streams.broker import make_consumer, make_producer
from streams.settings import Settings
from streams.stack.running import RunningStack


async def test_records_survive_a_kill_of_the_broker(stack: RunningStack, settings: Settings) -> None:
    topic = settings.topics.full_name("items")
    producer: AIOKafkaProducer = make_producer(settings.kafka)
    await producer.start()
    try:
        for number in range(20):
            await producer.send_and_wait(topic, b"%d" % number, key=b"k")
        stack.kill("kafka")
        stack.wait_ready("kafka")
        await producer.send_and_wait(topic, b"after", key=b"k")
    finally:
        await producer.stop()
    consumer = make_consumer(settings.kafka, topic, auto_offset_reset="earliest")
    await consumer.start()
    try:
        values: list[bytes] = []
        while b"after" not in values:
            for records in (await consumer.getmany(timeout_ms=5000)).values():
                values += [record.value for record in records]
    finally:
        await consumer.stop()
    assert values == [b"%d" % number for number in range(20)] + [b"after"]
