"""Rights on groups and transactional ids are asked for by requests that change nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import errors as kafka_errors
from aiokafka.client import CoordinationType
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.protocol.transaction import EndTxnRequest

from schemas.errors import BrokerUnavailable
from streams.broker import rights_asked
from streams.broker.clients import BrokerConfig
from streams.broker.rights_asked import Answers, ask

READ, WRITE = "read group g", "write transactional id t"


class Broker:
    """Looks for coordinators, and answers, with these errors in turn; the last one stays."""

    def __init__(self, looked_up: list[type[Exception]], answered: list[type[Exception]]) -> None:
        self._looked_up, self._answered = looked_up, answered
        self.requests: list[Any] = []

    async def coordinator_lookup(self, kind: CoordinationType, name: str) -> int:
        error = self._looked_up.pop(0) if len(self._looked_up) > 1 else self._looked_up[0]
        if error is not kafka_errors.NoError:
            raise error
        return 3

    async def send(self, node: int, request: Any, group: Any) -> Any:
        self.requests.append(request)
        error = self._answered.pop(0) if len(self._answered) > 1 else self._answered[0]
        return SimpleNamespace(error_code=error.errno)  # type: ignore[attr-defined]


OK = kafka_errors.NoError
AWAY = kafka_errors.GroupCoordinatorNotAvailableError
LOADING = kafka_errors.GroupLoadInProgressError
NO_READ, NO_WRITE = kafka_errors.GroupAuthorizationFailedError, kafka_errors.TransactionalIdAuthorizationFailed


@pytest.mark.parametrize(
    ("looked_up", "answered", "expected"),
    [
        ([OK], [kafka_errors.UnknownMemberIdError, kafka_errors.InvalidProducerIdMapping], Answers([READ, WRITE])),
        ([OK], [NO_READ, NO_WRITE], Answers(refused=[READ, WRITE])),
        ([NO_READ, NO_WRITE], [OK], Answers(refused=[READ, WRITE])),
        ([OK], [kafka_errors.IllegalGenerationError, OK], Answers([READ, WRITE])),
        ([AWAY, OK], [LOADING, kafka_errors.UnknownMemberIdError, NO_WRITE], Answers([READ], [WRITE])),
        ([AWAY], [OK], Answers(unknown=[READ, WRITE])),
        ([OK], [kafka_errors.UnsupportedVersionError], Answers(unknown=[READ, WRITE])),
    ],
    ids=["allowed", "refused", "refused at once", "no such generation", "not yet", "never", "unsupported"],
)
async def test_a_right_is_there_refused_or_unknown(
    looked_up: list[type[Exception]], answered: list[type[Exception]], expected: Answers
) -> None:
    assert await ask(Broker(list(looked_up), list(answered)), ["g"], ["t"], tries=3, pause_seconds=0.0) == expected


async def test_the_connection_is_closed_after_the_answers_and_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Connected] = []

    class Connected(Broker):
        closed = 0

        def __init__(self, **_: Any) -> None:
            super().__init__([OK], [OK])
            made.append(self)

        async def bootstrap(self) -> None:
            if len(made) > 1:
                raise kafka_errors.KafkaConnectionError("away")

        async def close(self) -> None:
            self.closed += 1

    monkeypatch.setattr(rights_asked, "AIOKafkaClient", Connected)
    assert await rights_asked.ask_for_rights(BrokerConfig(), ["g"], ["t"]) == Answers([READ, WRITE])
    with pytest.raises(BrokerUnavailable):
        await rights_asked.ask_for_rights(BrokerConfig(), ["g"], ["t"])
    assert [one.closed for one in made] == [1, 1]


async def test_what_is_asked_names_a_member_and_a_producer_that_nobody_is() -> None:
    broker = Broker([OK], [OK])
    await ask(broker, ["g"], ["t"])
    heartbeat, end = broker.requests
    assert isinstance(heartbeat, HeartbeatRequest) and heartbeat._member_id == "mimstream-check"
    assert isinstance(end, EndTxnRequest) and end._producer_id == 2**62 and not end._transaction_result
