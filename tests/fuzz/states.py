"""Records of `item-states` and `skew`, through the code that servers, trainers and `mimstream skew` read them with."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import redirect_stdout
from copy import deepcopy
from functools import cache
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np

from schemas.item_states import ItemState, StateHead, parse_state_key, state_key, state_value
from schemas.skew import SkewRecord
from streams.broker.clients import BrokerConfig
from streams.broker.topics import TopicsConfig
from streams.commands import skew as skew_command
from streams.monitoring.metrics import Metrics
from streams.serving.states_follower import StatesFollower
from streams.training.reports import SkewReport
from streams.training.skew_report import SkewFound, summary
from streams.training.skew_watch import SkewWatch
from tests.factories.state_pipe import CONFIG, TAKES, Pipe, of_server
from trainer.features.state_records import StateCopies, StateWriter
from trainer.samples.id_hashes import hash_columns, id_hashes

ITEM = id_hashes("i3")[0]
"""The item that records without a key are of; the requests that are computed ask for it."""


@cache
def _trained() -> Pipe:
    """Never changed by what is read."""
    pipe = Pipe()
    pipe.count(TAKES)
    pipe.write()
    pipe.state.hold()
    return pipe


@cache
def _begun() -> tuple[StateCopies, StateWriter, bytes]:
    """A server's copies and a trainer's writer that have read the topic, and the features of such a server."""
    pipe, copies, writer = _trained(), StateCopies(CONFIG), StateWriter(CONFIG, log="another")
    for record in pipe.topic:
        copies.apply(*record)
        writer.heard(*record)
    return copies, writer, of_server(copies, pipe.world).tobytes()


def _read(key: bytes | None, value: bytes | None) -> None:
    """Servers go on, compute finite features, and a trainer that begins writes what makes them true again."""
    pipe, (copies, writer, expected) = _trained(), _begun()
    follower = StatesFollower(CONFIG, BrokerConfig(), TopicsConfig(), clock=lambda: 0.0)
    follower._reading = follower.copies = copies = deepcopy(copies)
    for record in ((key, value), pipe.topic[-1]):
        asyncio.run(follower._apply([SimpleNamespace(key=record[0], value=record[1])], "source", 1))
        assert np.isfinite(of_server(copies, pipe.world)).all()
        _metrics().record(follower.report())
    assert copies.head == pipe.copies.head and copies.complete
    writer = deepcopy(writer)
    writer.heard(key, value)
    write = writer.next(pipe.state, most=1_000)
    assert write is not None
    for written in write.records:
        copies.apply(*written)
    assert of_server(copies, pipe.world).tobytes() == expected


@cache
def _metrics() -> Metrics:
    return Metrics("serve")


def read_state(data: bytes) -> None:
    """A value, as JSON of an item and of all items, and as the state of such records."""
    for item in (ITEM, None):
        _read(state_key(CONFIG.version, item), data)
    _read(state_key(CONFIG.version, ITEM), state_value(CONFIG.version, data))
    head = StateHead(number=2, before=0, left=0, log="log")
    _read(state_key(CONFIG.version, None), state_value(CONFIG.version, data, head))


def read_state_key(data: bytes) -> None:
    """A key. Raises `ValueError`."""
    value = state_value(CONFIG.version, _trained().state.record(ITEM) or b"")
    for key in (data, CONFIG.version.encode() + b":" + data):
        for told in (None, b"{", value):
            _read(key, told)
    features, item = parse_state_key(data)
    assert state_key(features, item) == data
    ItemState(features=features, state=b"")


def read_skew(data: bytes) -> None:
    """A record, through a trainer that keeps the state that it names, and through the report."""
    pipe, reports, found = _trained(), list[SkewReport](), SkewFound()
    assert pipe.copies.head is not None
    watch = SkewWatch(
        CONFIG,
        every_seconds=1,
        limit=0.0,
        topic="skew",
        clock=lambda: 1_777_000_000.0,
        on_report=reports.append,
        follow=lambda handle: None,  # type: ignore[return-value,arg-type]
    )
    for value in (data, _with_state(data)):
        watch.begin(pipe.copies.head)
        watch.hear(value)
        found.hear(value)
        compared = watch.compare(_Trainer(pipe))  # type: ignore[arg-type]
        assert (compared is not None) == bool(reports)
        if compared is not None:
            found.hear(compared[2])
            _metrics_of_training().record(reports.pop())
            assert SkewRecord.model_validate_json(compared[2]).outcome in found.outcomes
    report = summary(found, limit=0.01)
    json.dumps(report, allow_nan=False)
    with redirect_stdout(StringIO()) as shown:
        skew_command._print(report)
    assert shown.getvalue().replace("\n", "").isprintable()


def _with_state(data: bytes) -> bytes:
    """The record, of the state that is kept, with as many values as it needs."""
    try:
        plain: Any = json.loads(data)
        served = plain["served"]
        bits = base64.b64decode(served["values"])[:64] or b"\0"
        size = 4 * len(served["targets"]) * len(CONFIG.names)
        head = _trained().copies.head
        assert head is not None
        served |= {"number": head.number, "before": head.before}
        served["values"] = base64.b64encode((bits * (size // len(bits) + 1))[:size]).decode()
        return json.dumps(plain | {"features": CONFIG.version}).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return data


@cache
def _metrics_of_training() -> Metrics:
    return Metrics("train")


class _Trainer:
    """What `SkewWatch` asks of an `OnlineTrainer`."""

    def __init__(self, pipe: Pipe) -> None:
        self.moment = pipe.state
        self._pipe = pipe

    def held_states(self, item_ids: list[str]) -> Any:
        """Facts are those of the first items, whatever the ids."""
        hashes_U2 = np.concatenate([np.zeros((1, 2), np.int64), hash_columns(item_ids)])
        numbers = np.minimum(np.arange(len(hashes_U2)), len(self._pipe.world.names) - 1)
        return self.moment.held_states(hashes_U2, self._pipe.world.facts(numbers))
