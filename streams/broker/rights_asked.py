"""Whether this login may use a consumer group and a transactional id, asked without touching either.

A description by the broker names the rights on topics only. But a request is first judged by the right and then by what
it holds: one that names a member or a producer that nobody is changes nothing, and its refusal tells which it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import errors as kafka_errors
from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.protocol.transaction import EndTxnRequest

from streams.broker.clients import BrokerConfig, broker_errors

_NOBODY = "mimstream-check"
_NO_PRODUCER = 2**62

_REFUSED = (
    kafka_errors.GroupAuthorizationFailedError,
    kafka_errors.TransactionalIdAuthorizationFailed,
)
_ALLOWED = (
    kafka_errors.NoError,
    kafka_errors.UnknownMemberIdError,
    kafka_errors.IllegalGenerationError,
    kafka_errors.InvalidProducerIdMapping,
)
_NOT_YET = (
    kafka_errors.GroupCoordinatorNotAvailableError,  # a new cluster makes its coordinators' topic when first asked
    kafka_errors.NotCoordinatorForGroupError,
    kafka_errors.GroupLoadInProgressError,
    kafka_errors.NodeNotReadyError,
)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the broker said, right by right."""

    allowed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


async def ask_for_rights(broker: BrokerConfig, groups: Sequence[str], transactional_ids: Sequence[str]) -> Answers:
    """Ask for Read on each group and Write on each transactional id. Raises `BrokerUnavailable`, `Misconfigured`."""
    client = AIOKafkaClient(**broker.client_options())
    try:
        with broker_errors(broker):
            await client.bootstrap()
            return await ask(client, groups, transactional_ids)
    finally:
        await client.close()


async def ask(
    client: Any, groups: Sequence[str], transactional_ids: Sequence[str], *, tries: int = 40, pause_seconds: float = 0.2
) -> Answers:
    """As `ask_for_rights`, over a connected client."""
    answers = Answers()
    asked: list[tuple[str, CoordinationType, str, Any]] = []
    for name in groups:
        asked.append((f"read group {name}", CoordinationType.GROUP, name, HeartbeatRequest(name, 0, _NOBODY)))
    for name in transactional_ids:
        aborts = EndTxnRequest(name, _NO_PRODUCER, 0, False)
        asked.append((f"write transactional id {name}", CoordinationType.TRANSACTION, name, aborts))
    for right, kind, name, request in asked:
        for _ in range(tries):
            error = await _answer(client, kind, name, request)
            if error not in _NOT_YET:
                break
            await asyncio.sleep(pause_seconds)
        said = answers.refused if error in _REFUSED else answers.allowed if error in _ALLOWED else answers.unknown
        said.append(right)
    return answers


async def _answer(client: Any, kind: CoordinationType, name: str, request: Any) -> type[Exception]:
    try:
        node = await client.coordinator_lookup(kind, name)
        answer = await client.send(node, request, group=ConnectionGroup.COORDINATION)
    except (*_REFUSED, *_NOT_YET) as error:
        return type(error)
    found: type[Exception] = kafka_errors.for_code(answer.error_code)
    return found
