"""The lines of `mimstream check` about topics, groups and the behaviour view, and the judgements behind them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from schemas.errors import Misconfigured
from schemas.items import record_bytes_for
from streams.broker.cluster import ClusterTopics, TopicIncarnation
from streams.broker.rights_asked import Answers
from streams.broker.topics import TOPICS, TopicsConfig
from streams.settings import Settings
from streams.wiring import preflight
from streams.wiring.preflight import _CheckFailed, _CheckUnknown, picture_sizes
from streams.wiring.rights import RIGHTS, ROLES, Rights, rights_table
from streams.wiring.topic_checks import _is_enough, right_problems, specs_of, topic_problems, unseen
from trainer.features.config import FeatureConfig

SETTINGS = Settings()


def cluster(brokers: int = 1, copies: int = 1, **changed: Any) -> ClusterTopics:
    """Topics as they are created."""
    made = ClusterTopics(
        cluster_id="c", topic_ids={}, brokers=brokers, replicas=dict.fromkeys(TOPICS, copies),
        partitions={name: list(range(spec.partitions(SETTINGS.topics))) for name, spec in TOPICS.items()},
        configs={name: dict(spec.settings(SETTINGS.topics, SETTINGS.kafka)) for name, spec in TOPICS.items()},
        rights={name: frozenset({"READ", "WRITE"}) for name in TOPICS},
    )  # fmt: skip
    return replace(made, **changed)


@pytest.mark.parametrize("partitions", [1, 99])
def test_another_number_of_partitions_is_told_with_the_setting_that_says_so(partitions: int) -> None:
    found = cluster()
    found.partitions["items"] = list(range(partitions))
    ((what, fix),) = topic_problems(TOPICS["items"], SETTINGS, found)
    assert f"mim.items has {partitions} partitions" in what and f"MIM_TOPICS__PARTITIONS={partitions}" in fix


def test_a_topic_that_has_one_partition_whatever_the_settings_is_created_anew() -> None:
    found = cluster()
    found.partitions["item-states"] = [0, 1]
    ((what, fix),) = topic_problems(TOPICS["item-states"], SETTINGS, found)
    assert "mim.item-states has 2 partitions; it has to have one" in what
    assert "topics create" in fix and "MIM_TOPICS__PARTITIONS" not in fix


@pytest.mark.parametrize(
    ("key", "held", "wanted", "enough"),
    [
        ("retention.ms", "60", "60", True),
        ("retention.ms", "59", "60", False),
        ("retention.ms", "-1", "60", True),
        ("retention.ms", "60", "-1", False),
        ("retention.bytes", "-1", "-1", True),
        ("max.message.bytes", "99", "100", False),
        ("delete.retention.ms", "101", "100", True),
        ("cleanup.policy", "compact", "compact", True),
        ("cleanup.policy", "delete", "compact", False),
        ("cleanup.policy", "compact,delete", "compact", False),
        ("cleanup.policy", "delete,compact", "compact,delete", True),
        ("cleanup.policy", "compact", "compact,delete", False),
    ],
)
def test_a_setting_is_enough_if_it_keeps_as_much(key: str, held: str, wanted: str, enough: bool) -> None:
    assert _is_enough(key, held, wanted) is enough


@pytest.mark.parametrize(
    ("replicas", "held", "config", "least"),
    [
        (2, "1", {}, None),
        (3, "1", {}, 2),
        (3, "2", {}, None),
        (4, "1", {}, 2),
        (2, "1", {"min_insync_replicas": 2}, 2),
        (3, "0", {}, None),
    ],
)
def test_a_record_has_to_be_in_two_places_where_there_are_three(
    replicas: int, held: str, config: dict[str, int], least: int | None
) -> None:
    found = cluster(brokers=replicas, copies=replicas)
    found.configs["items"]["min.insync.replicas"] = held
    settings = SETTINGS.model_copy(update={"topics": TopicsConfig(**config)})
    problems = topic_problems(TOPICS["items"], settings, found)
    assert [fix for _, fix in problems] == (
        []
        if least is None
        else [f"set its min.insync.replicas to {least} on the cluster, or say MIM_TOPICS__MIN_INSYNC_REPLICAS={held}"]
    )


def test_a_cluster_that_does_not_tell_its_replicas_is_not_judged_by_them() -> None:
    assert topic_problems(TOPICS["items"], SETTINGS, cluster(brokers=3, replicas={})) == []


def test_each_right_that_is_lacking_is_named_with_its_topics_and_its_role() -> None:
    nothing = cluster(rights={**{name: frozenset({"READ", "WRITE"}) for name in TOPICS}, "items": frozenset(),
                              "embeddings": frozenset({"WRITE"})})  # fmt: skip
    told = [what for what, _ in right_problems(["index", "record", "serve"], SETTINGS, nothing)]
    assert told == [
        "this login may not read mim.items, mim.embeddings, as index has to",
        "this login may not read mim.items, as record has to",
        "this login may not read mim.embeddings, as serve has to",
    ]


def test_the_topics_of_roles_come_once_in_the_order_of_the_table() -> None:
    order = list(TOPICS)
    for roles in (ROLES, ["serve", "index"], ["index", "serve"]):
        names = [spec.name for spec in specs_of(roles, SETTINGS)]  # type: ignore[arg-type]
        assert names == [
            name for name in order if any(name in RIGHTS[role].reads + RIGHTS[role].writes for role in roles)
        ]


def test_who_handles_no_searches_needs_no_topic_of_theirs() -> None:
    reading = SETTINGS.trainer.model_copy(update={"features": FeatureConfig(queries=True)})
    found = cluster(rights={name: frozenset({"READ", "WRITE"}) - {"READ"} for name in TOPICS})
    for settings, asked in ((SETTINGS, False), (SETTINGS.model_copy(update={"trainer": reading}), True)):
        assert ("queries" in {spec.name for spec in specs_of(["train"], settings)}) is asked
        assert ("mim.queries" in str(right_problems(["train"], settings, found))) is asked
    alone = SETTINGS.model_copy(update={"index": SETTINGS.index.model_copy(update={"queries": False})})
    assert {"queries", "behaviours"} & {spec.name for spec in specs_of(["index"], SETTINGS)}
    assert not {"queries", "behaviours"} & {spec.name for spec in specs_of(["index"], alone)}


def test_only_topics_that_are_asked_about_are_told_as_unseen() -> None:
    found = cluster(hidden=frozenset({"models", "items"}), configs={})
    del found.partitions["models"], found.partitions["items"]
    told = [what for what, _ in unseen(["models", "embeddings"], SETTINGS, found)]
    assert told == [
        "mim.models: not visible to this login, or missing",
        "settings of mim.embeddings: not readable by this login",
    ]


def test_rights_beside_topics_are_told_with_the_prefix_of_this_cluster() -> None:
    assert Rights().beside_topics == ""
    assert Rights(joins="train", transactional_id="train", other="more").beside_topics == (
        "group <prefix>train: Read; transactional id <prefix>train: Write, Describe; more"
    )
    rows = {row[0]: row for row in rights_table(TopicsConfig(prefix="shop."))}
    assert (
        rows["serve"][1] == "shop.embeddings, shop.item-states, shop.models"
        and rows["record"][2] == "shop.dead-letters"
    )
    assert "group shop.index: Read" in rows["index"][3] and "<prefix>" not in str(rows)
    assert rows["serve"][4:] == ("read", "read") and rights_table()[0][1].startswith("items, ")


# ---- lines -----------------------------------------------------------------------------------------------------------


async def topics(monkeypatch: pytest.MonkeyPatch, found: ClusterTopics, *roles: Any) -> str:
    def describe(_: Any, __: Any, names: list[str], *, with_configs: bool, missing_ok: bool) -> ClusterTopics:
        assert with_configs and missing_ok and names == [spec.name for spec in specs_of(roles, SETTINGS)]
        return found

    monkeypatch.setattr(preflight, "describe_topics", describe)
    return await preflight._topics(SETTINGS, roles)


async def test_the_line_of_topics_fails_for_what_is_wrong_before_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await topics(monkeypatch, cluster(), "serve") == "4 topics with prefix 'mim.'"
    hidden = cluster(hidden=frozenset({"models"}))
    with pytest.raises(_CheckUnknown, match=r"mim\.models: not visible"):
        await topics(monkeypatch, hidden, "serve")
    lacking = replace(hidden, rights={"embeddings": frozenset({"WRITE"})})
    with pytest.raises(_CheckFailed, match=r"may not read mim\.embeddings, as serve"):
        await topics(monkeypatch, lacking, "serve")
    assert "topics" in await topics(monkeypatch, replace(cluster(), hidden=frozenset({"items"})), "serve")
    missing = cluster()
    del missing.partitions["items"], missing.partitions["behaviours"]
    with pytest.raises(_CheckFailed, match=r"mim\.items is missing; mim\.behaviours is missing") as caught:
        await topics(monkeypatch, missing, *ROLES)
    assert caught.value.fix == "run 'mimstream topics create'", "one thing to do is said once"


async def test_groups_and_transactional_ids_of_the_roles_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    async def ask(_: Any, groups: list[str], ids: list[str]) -> Answers:
        asked.append((groups, ids))
        return Answers(["read group g"])

    monkeypatch.setattr(preflight, "ask_for_rights", ask)
    assert await preflight._groups(SETTINGS, ROLES) == "this login may read group g"
    await preflight._groups(SETTINGS, ["record", "serve"])
    group = SETTINGS.topics.group
    assert asked == [([group("index"), group("record"), group("train")], [group("train")]), ([group("record")], [])]


async def test_a_view_of_another_log_fails_and_an_empty_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    held: list[TopicIncarnation | None] = [None]

    class Store:
        def __init__(self, *_: Any) -> None: ...

        async def bound_log(self) -> TopicIncarnation | None:
            return held[0]

        async def counts(self) -> dict[str, int]:
            return {"takes": 3, "exposures": 4}

        async def close(self) -> None:
            closed.append(True)

    ours = TopicIncarnation("c", "mim.behaviours", "b")
    monkeypatch.setattr(preflight, "RedisBehaviourStore", Store)
    monkeypatch.setattr(preflight, "make_redis", lambda _: None)
    monkeypatch.setattr(preflight, "read_incarnation", lambda *_: ours)
    assert "empty" in await preflight._view(SETTINGS)
    held[0] = ours
    assert await preflight._view(SETTINGS) == "3 takes and 4 exposures of mim.behaviours"
    for other in (replace(ours, topic_id="made again"), replace(ours, cluster_id="another")):
        held[0] = other
        with pytest.raises(Misconfigured):
            await preflight._view(SETTINGS)
    assert closed == [True] * 4


@pytest.mark.parametrize(
    ("images", "body", "roles", "told"),
    [
        (999, record_bytes_for(999), ROLES, None),
        (999, record_bytes_for(999) - 1, ["serve"], "MIM_SERVE__MAX_BODY_BYTES"),
        (999, 1_024, ["index"], None),
        (998, 10_000, ROLES, "MIM_IMAGES__MAX_BYTES to 999"),
    ],
)
def test_a_picture_needs_a_way_in_and_room_in_a_query(images: int, body: int, roles: Any, told: str | None) -> None:
    sections = {
        "encoder": {"max_image_bytes": 999}, "images": {"max_bytes": images}, "kafka": {"max_record_bytes": 1_024},
        "serve": {"max_body_bytes": body},
    }  # fmt: skip
    settings = SETTINGS.model_copy(
        update={name: getattr(SETTINGS, name).model_copy(update=values) for name, values in sections.items()}
    )
    line = picture_sizes(settings, roles)
    assert line.state == ("ok" if told is None else "failed") and (told is None or told in (line.fix or ""))
    assert told is not None or re.search("larger ones need an image_url$", line.detail)
