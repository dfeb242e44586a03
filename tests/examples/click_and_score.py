"""Send an exposure and a click, then ask for a score. `mimstream record` and `mimstream serve` run beside it."""

import json
import os
import time
import urllib.error
import urllib.request
import uuid
from datetime import UTC, datetime

from kafka import KafkaProducer

BROKER = os.environ.get("MIM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:19092")
BEHAVIOURS = os.environ.get("MIM_TOPICS__PREFIX", "mim.") + "behaviours"
SERVE = f"http://127.0.0.1:{os.environ.get('MIM_SERVE__PORT', '8080')}"


def score(user_id: str, *item_ids: str) -> dict[str, object]:
    """The probability that the user takes each item. Before the first release the answer is status 503."""
    body = json.dumps({"user_id": user_id, "item_ids": item_ids}).encode()
    request = urllib.request.Request(f"{SERVE}/v1/score", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(error.read().decode()) from None


common = {"user_id": "u-9", "item_id": "sku-1001", "occurred_at": datetime.now(UTC).isoformat()}
exposure = {**common, "event_id": uuid.uuid4().hex, "kind": "exposure"}
click = {**common, "event_id": uuid.uuid4().hex, "kind": "click", "exposure_id": exposure["event_id"]}
producer = KafkaProducer(bootstrap_servers=BROKER)
for event in (exposure, click):
    producer.send(BEHAVIOURS, key=event["user_id"].encode(), value=json.dumps(event).encode())
producer.close()

while not (answer := score("u-9", "sku-1001"))["history_length"]:  # until the click is recorded
    time.sleep(0.2)
print(answer)
