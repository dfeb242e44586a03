"""TLS and logins from the settings to the wire, and none of them in what is told."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import faust
import grpc
import pytest
from redis.exceptions import WatchError

from schemas.errors import Misconfigured, StoreUnavailable
from streams.broker.clients import BrokerConfig
from streams.indexing.app import faust_credentials
from streams.settings import load_settings
from streams.stores.histories.client import RedisConfig, make_redis, redis_errors
from streams.stores.vectors.collection import read_center
from streams.stores.vectors.config import MilvusConfig

TLS = Path(__file__).parents[2] / "factories" / "tls"
CERTIFICATE, KEY = str(TLS / "for-tests-only.crt"), str(TLS / "for-tests-only.key")
OTHER = str(TLS / "another-authority.crt")
SECRET = "correct-horse-battery-staple"


def test_kafka_is_told_of_login_authority_and_certificate_in_all_its_clients() -> None:
    login = {"security_protocol": "SASL_SSL", "sasl_username": "mim", "sasl_password": SECRET}
    files = {"ssl_cafile": CERTIFICATE, "ssl_certfile": CERTIFICATE, "ssl_keyfile": KEY}
    config = BrokerConfig.model_validate(login | files)
    options = config.client_options()
    context = options["ssl_context"]
    assert (options["sasl_mechanism"], options["sasl_plain_username"]) == ("SCRAM-SHA-512", "mim")
    assert options["sasl_plain_password"] == SECRET
    assert [one["subject"] for one in context.get_ca_certs()] == [((("commonName", "for tests only"),),)]
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    of_faust = faust_credentials(config)
    assert isinstance(of_faust, faust.SASLCredentials) and of_faust.ssl_context is not None
    assert (of_faust.username, of_faust.password, of_faust.mechanism.value) == ("mim", SECRET, "SCRAM-SHA-512")
    assert isinstance(faust_credentials(config.model_copy(update={"security_protocol": "SSL"})), faust.SSLCredentials)
    assert faust_credentials(BrokerConfig()) is None
    assert SECRET not in repr(config)


def test_files_that_cannot_be_read_are_named_by_their_settings() -> None:
    with pytest.raises(Misconfigured, match="MIM_KAFKA__SSL_CAFILE"):
        BrokerConfig(security_protocol="SSL", ssl_cafile="/nowhere").client_options()
    with pytest.raises(Misconfigured, match="rediss://"):
        make_redis(RedisConfig(ssl_cafile=CERTIFICATE))
    for wrong in ({"ssl_certfile": CERTIFICATE}, {"ssl_cafile": CERTIFICATE, "uri": "http://127.0.0.1:1"}):
        with pytest.raises(ValueError, match="ssl_cafile"):
            MilvusConfig(**wrong)


async def test_redis_is_asked_over_tls_with_the_login_and_only_if_its_authority_is_known() -> None:
    said: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(4_096):
                said.append(data)
                writer.write(b"-WRONGPASS as far as this server knows\r\n")
                await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, KEY)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]

    async def ask(authority: str) -> None:
        login = {"url": f"rediss://127.0.0.1:{port}/0", "username": "mim", "password": SECRET}
        config = RedisConfig.model_validate(login | {"ssl_cafile": authority, "timeout_seconds": 5})
        client: Any
        async with aclosing(make_redis(config)) as client:
            with redis_errors(config):
                await client.execute_command("SET", "a", "b")

    with pytest.raises(Misconfigured, match="MIM_REDIS__PASSWORD") as caught:
        await ask(CERTIFICATE)
    assert SECRET not in str(caught.value)
    heard = b"".join(said)
    assert b"mim" in heard and SECRET.encode() in heard
    said.clear()
    with pytest.raises(StoreUnavailable, match="MIM_REDIS__URL") as unknown:
        await ask(OTHER)
    assert said == [] and SECRET not in str(unknown.value)
    server.close()


class Listening(grpc.GenericRpcHandler):
    """Notes who calls what, and answers nothing."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    def service(self, call: grpc.HandlerCallDetails) -> None:
        self.tokens += [str(value) for name, value in call.invocation_metadata if name == "authorization"]


@pytest.fixture
def milvus() -> Iterator[tuple[Listening, str]]:
    heard = Listening()
    server = grpc.server(ThreadPoolExecutor(2), handlers=[heard])
    credentials = grpc.ssl_server_credentials([(Path(KEY).read_bytes(), Path(CERTIFICATE).read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield heard, f"https://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("with_certificate", [False, True])
async def test_milvus_is_asked_over_tls_with_the_token_and_only_if_its_authority_is_known(
    milvus: tuple[Listening, str], with_certificate: bool
) -> None:
    heard, uri = milvus
    files = {"ssl_certfile": CERTIFICATE, "ssl_keyfile": KEY} if with_certificate else {}
    for authority, reached in ((CERTIFICATE, True), (OTHER, False)):
        heard.tokens.clear()
        config = MilvusConfig(uri=uri, token=f"root:{SECRET}", ssl_cafile=authority, timeout_seconds=2, **files)  # type: ignore[arg-type]
        with pytest.raises(StoreUnavailable) as caught:
            await read_center(config)
        assert bool(heard.tokens) is reached and SECRET not in str(caught.value)


async def test_a_login_in_an_address_is_not_repeated() -> None:
    with pytest.raises(StoreUnavailable, match=r"http://127\.0\.0\.1:9") as caught:
        await read_center(MilvusConfig(uri=f"http://root:{SECRET}@127.0.0.1:9", timeout_seconds=1))
    assert SECRET not in str(caught.value)


def test_what_is_wrong_with_a_setting_is_told_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_SERVE__TOKENS", '["shortsecret"]')
    monkeypatch.setenv("MIM_REDIS__URL", f"http://:{SECRET}@127.0.0.1/0")
    with pytest.raises(Misconfigured) as caught:
        load_settings()
    told = str(caught.value)
    assert "MIM_SERVE__TOKENS" in told and "MIM_REDIS__URL" in told
    assert "shortsecret" not in told and SECRET not in told


def test_a_connection_to_redis_that_goes_while_keys_are_watched_is_waited_for() -> None:
    with pytest.raises(StoreUnavailable, match="MIM_REDIS__URL"), redis_errors(RedisConfig()):
        raise WatchError("A ConnectionError occurred while watching one or more keys")  # as redis-py puts it
