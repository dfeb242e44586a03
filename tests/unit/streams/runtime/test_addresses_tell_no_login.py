"""No part of a login that somebody wrote into an address comes out, however the address is broken."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from schemas.errors import Misconfigured
from streams.broker.clients import BrokerConfig
from streams.runtime.endpoints import checked_endpoint, shown_endpoint
from streams.settings import load_settings
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.histories.client import RedisConfig, make_redis
from streams.stores.vectors.config import MilvusConfig

BROKEN_LOGINS = [
    ":hunter2#x@host:6379/0",
    ":x#hunter2@host:6379/0",
    "user:hunter2/x@host:6379/0",
    "user:12/hunter2@host:6379/0",  # parsed as host "user", port 12
    ":hunter2?x@host:6379/0",
    ":hunter2[x@host:6379/0",
    "user:hunter2℀@host:6379/0",  # urllib repeats what it will not normalise
    ":hunter2",
    "host:6379/0?password=x@hunter2",
]
PLACES: list[tuple[type[BaseModel], str, str]] = [
    *((RedisConfig, "url", f"redis://{rest}") for rest in BROKEN_LOGINS),
    *((MilvusConfig, "uri", f"http://{rest}") for rest in BROKEN_LOGINS),
    (MilvusConfig, "uri", "ftp://root:hunter2@host:19530"),
    (MilvusConfig, "uri", "root:hunter2@host:19530"),
    (BrokerConfig, "bootstrap_servers", "me:hunter2@host:9092"),
    (BrokerConfig, "bootstrap_servers", "SASL_SSL://me:hunter2@host:9092"),
    (ModelStoreConfig, "url", "s3://AKIA:hunter2@bucket/x"),
    (ModelStoreConfig, "url", "s3://AKIA:x/hunter2@bucket/x"),
]
SECTIONS = {RedisConfig: "REDIS", MilvusConfig: "MILVUS", BrokerConfig: "KAFKA", ModelStoreConfig: "MODELS"}


@pytest.mark.parametrize(("config", "field", "address"), PLACES)
def test_an_address_whose_login_could_be_shown_is_refused_and_not_repeated(
    config: type[BaseModel], field: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValidationError) as refused:
        config.model_validate({field: address})
    variable = f"MIM_{SECTIONS[config]}__{field.upper()}"
    monkeypatch.setenv(variable, address)
    with pytest.raises(Misconfigured, match=variable) as told:
        load_settings()
    for text in (str(refused.value), repr(refused.value), str(told.value)):
        assert "hunter2" not in text


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("rediss://me:p%2Fss%23%40x@host:6379/0", "rediss://host:6379/0"),
        ("redis://me:p@ss@[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis://host/0?password=hunter2", "redis://host/0"),
        ("unix://me:hunter2@/run/valkey.sock?db=1", "unix:///run/valkey.sock"),
    ],
)
def test_an_address_that_reads_one_way_is_used_and_shown_without_its_login(address: str, shown: str) -> None:
    config = RedisConfig(url=address)
    make_redis(config)
    assert config.shown_url == shown_endpoint(address) == shown


def test_buckets_prefixes_and_brokers_as_they_are_written_are_taken() -> None:
    for url in ("s3://bucket", "s3://my.bucket_1/pre@fix", "s3://arn:aws:s3:eu-west-1:1:accesspoint/a/b", "memory://x"):
        assert ModelStoreConfig(url=url).url == url
    for servers in ("kafka-1:9092,kafka-2:9092", "[::1]:9092"):
        assert BrokerConfig(bootstrap_servers=servers).bootstrap_servers == servers


def test_a_wrong_option_of_redis_is_named_without_the_login() -> None:
    with pytest.raises(Misconfigured, match=r"MIM_REDIS__URL \(redis://host/0\).*socket_timeout") as told:
        make_redis(RedisConfig(url="redis://:hunter2@host/0?socket_timeout=soon"))
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("host:6379", "begins with redis:// or rediss://"),
        ("http://host:6379", "begins with redis:// or rediss://"),
        ("redis:/host", "begins with redis:// or rediss://"),
        ("redis://host:70000/0", "a number up to 65535"),
        ("redis://host:port/0", "a number up to 65535"),
        ("redis://[::1:6379", "no host:port"),
        ("redis://me:a/b@host", "percent-encode"),
    ],
)
def test_an_address_that_is_none_is_refused_with_what_is_wrong(address: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        checked_endpoint(address, schemes=("redis", "rediss"))
    right = "rediss://me:x@[::1]:65535/0"
    assert checked_endpoint(right, schemes=("redis", "rediss")) == right
