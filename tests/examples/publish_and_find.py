"""Publish an item and find it by a text. `mimstream index` and `mimstream serve` run beside it."""

import json
import os
import time
import urllib.request
from datetime import UTC, datetime

from kafka import KafkaProducer

BROKER = os.environ.get("MIM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:19092")
ITEMS = os.environ.get("MIM_TOPICS__PREFIX", "mim.") + "items"
SERVE = f"http://127.0.0.1:{os.environ.get('MIM_SERVE__PORT', '8080')}"


def search(text: str) -> list[dict[str, object]]:
    """The items nearest to a text, nearest first."""
    body = json.dumps({"text": text, "k": 3}).encode()
    request = urllib.request.Request(f"{SERVE}/v1/similar", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:  # the first text loads the encoder
        return json.load(answer)["results"][0]["neighbours"]


item = {
    "item_id": "sku-1001",
    "title": "Linen shirt",
    "category": "shirts",
    "price": 39.0,
    "published_at": datetime.now(UTC).isoformat(),
}
producer = KafkaProducer(bootstrap_servers=BROKER)
producer.send(ITEMS, key=item["item_id"].encode(), value=json.dumps(item).encode())
producer.close()

while not (found := search("a light shirt for the summer")):
    time.sleep(0.2)
print(found)
