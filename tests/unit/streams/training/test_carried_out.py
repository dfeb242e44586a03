"""Between a decision and the pointer: what was decided is carried out once, in order, whatever is away meanwhile."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from structlog.testing import capture_logs

from schemas.errors import BrokerUnavailable, Fenced, Misconfigured
from schemas.manifests import PromotionDecision
from streams.stores.artifacts.registry import in_memory_registry
from streams.training.promotion_gate import PromotionGate
from tests.factories import releases
from tests.factories.promotion import GATE, LOG, Scene
from tests.factories.samples import DIM

OURS = {"encoder_version": "enc-1", "dim": DIM, "cluster_id": LOG.cluster_id, "topic_ids": LOG.topic_ids}


@pytest.fixture
async def scene() -> Scene:
    """The first release is served."""
    made = await Scene(in_memory_registry()).start()
    await made.candidate()
    return made


async def lose_the_broker(scene: Scene, error: Exception) -> Any:
    """Until the returned function is called, no transaction succeeds."""
    transact = scene.leads.transact

    async def away(*_: Any, **__: Any) -> None:
        raise error

    scene.leads.transact = away  # type: ignore[method-assign]

    def back() -> None:
        scene.leads.transact = transact  # type: ignore[method-assign]

    return back


async def test_the_pointer_waits_for_the_notice_and_both_follow_when_the_broker_is_back(scene: Scene) -> None:
    await scene.candidate()
    back = await lose_the_broker(scene, BrokerUnavailable("Kafka", "away"))
    await scene.decide()
    assert scene.current == 1 and scene.publisher.unfinished and scene.publisher.released == 1
    with pytest.raises(BrokerUnavailable):
        await scene.publisher.finish()
    back()
    await scene.publisher.finish()
    assert scene.current == 2 and not scene.publisher.unfinished and scene.publisher.released == 2
    assert [(notice.release_id[1:7], notice.passed) for notice in scene.leads.notices] == [
        ("000001", True),
        ("000002", True),
    ]
    assert await scene.publisher.finish() is None and len(scene.leads.notices) == 2


async def test_a_trainer_that_is_superseded_at_the_notice_moves_nothing(scene: Scene) -> None:
    await scene.candidate()
    await lose_the_broker(scene, Fenced("another process leads"))
    with pytest.raises(Fenced):
        await scene.decide()
    assert scene.current == 1 and scene.publisher.released == 1


async def test_a_notice_describes_the_release_that_it_names(scene: Scene) -> None:
    (notice,), (manifest,) = scene.leads.notices, scene.store.list()
    assert (notice.release_id, notice.weights_sha256, notice.encoder_version, notice.released_at) == (
        manifest.release_id,
        manifest.weights_sha256,
        "enc-1",
        manifest.created_at,
    )
    assert notice.chosen_by is None


async def test_a_manifest_has_every_figure_of_its_candidate(scene: Scene) -> None:
    made = await scene.candidate()
    manifest = scene.store.list()[1]
    assert made.first_event_at is not None and made.last_event_at is not None and made.segment is not None
    assert (manifest.first_event_at, manifest.last_event_at) == (
        datetime.fromtimestamp(made.first_event_at, UTC),
        datetime.fromtimestamp(made.last_event_at, UTC),
    )
    assert (manifest.rows_trained, manifest.steps, manifest.rows_sha256) == (
        made.rows_trained,
        made.steps,
        made.rows_sha256,
    )
    assert (manifest.segment, manifest.rows_tree_sha256) == (made.segment.name, made.segment.root)
    assert (manifest.cluster_id, manifest.topic_ids, manifest.fence) == (
        LOG.cluster_id,
        LOG.topic_ids,
        scene.leads.fence,
    )
    assert (manifest.encoder_version, manifest.dim, manifest.config) == ("enc-1", DIM, made.config)
    assert manifest.metrics == made.metrics and manifest.offsets == {"behaviours": dict(made.offsets)}
    assert manifest.created_at == datetime.fromtimestamp(1_700_000_000, UTC)
    kept = await scene.publisher.segments()
    assert kept == {one.segment for one in scene.store.list()} and len(kept) == 2


async def test_releases_without_a_journal_keep_no_segment(scene: Scene) -> None:
    releases.publish(scene.store, 7)
    assert None not in await scene.publisher.segments()


@pytest.mark.parametrize("other", ["weights", "rows"])
async def test_only_the_same_weights_from_the_same_rows_are_the_same_release(scene: Scene, other: str) -> None:
    made = await scene.candidate()
    offsets = {"behaviours": dict(made.offsets)}
    assert (await scene.publisher.publish(made, offsets)).manifest.release_id == scene.store.list()[1].release_id
    change: dict[str, Any] = {"rows_sha256": "f" * 64}
    if other == "weights":
        change = {"weights": {name: weight + 1 for name, weight in made.weights.items()}}
    again = await scene.publisher.publish(replace(made, **change), offsets)
    assert again.manifest.release_id == scene.store.list()[2].release_id and again.decision is None


async def test_a_number_is_never_given_again_after_the_newest_release(scene: Scene) -> None:
    releases.publish(scene.store, 41)
    await scene.candidate()
    assert scene.store.list()[-1].release_id.startswith("r000042")


async def test_what_a_person_pinned_or_chose_is_told_as_the_reason_why_the_newest_does_not_serve(scene: Scene) -> None:
    scene.store.pin(True, why=None)
    await scene.candidate()
    await scene.decide()
    told = scene.publisher.not_serving or ""
    assert "r000002" in told and "passed" in told and "'mimstream models unpin'" in told
    scene.store.pin(False, why=None)
    await scene.candidate()
    second = scene.store.list()[1].release_id
    scene.store.choose(second, seen=scene.store.current(), rollback=False, why=None)
    await scene.decide()
    told = scene.publisher.not_serving or ""
    assert "r000003" in told and "chosen by hand" in told and (scene.publisher.held, scene.publisher.refused) == (2, 0)
    await scene.candidate()
    await scene.decide()
    assert scene.current == 4 and scene.publisher.not_serving is None


async def test_what_was_released_in_this_process_is_not_released_again(scene: Scene) -> None:
    (offsets,) = (manifest.offsets["behaviours"] for manifest in scene.store.list())
    assert not scene.publisher.beyond_current(offsets)
    assert scene.publisher.beyond_current({partition: offset + 1 for partition, offset in offsets.items()})
    await scene.candidate(spoil=-30.0)
    await scene.decide()
    refused = scene.store.list()[1].offsets["behaviours"]
    assert scene.publisher.refused == 1 and not scene.publisher.beyond_current(refused)


async def test_a_decision_that_was_kept_before_the_trainer_was_killed_is_carried_out_when_it_makes_the_same_again(
    scene: Scene,
) -> None:
    made = await scene.candidate()
    first, second = (manifest.release_id for manifest in scene.store.list())
    scene.store.record_decision(second, PromotionDecision(passed=True, against=first))
    again = await Scene(scene.store).start()
    await again.gate.admit(again.trainer, made, {"behaviours": dict(made.offsets)})
    assert again.current == 2 and again.trainer.shadow is None
    assert [notice.release_id for notice in again.leads.notices] == [second]


async def test_a_refusal_that_was_kept_is_not_announced_again(scene: Scene) -> None:
    made = await scene.candidate(spoil=-30.0)
    await scene.decide()
    again = await Scene(scene.store).start()
    await again.gate.admit(again.trainer, made, {"behaviours": dict(made.offsets)})
    assert again.current == 1 and again.leads.notices == [] and again.trainer.shadow is None


async def test_a_last_candidate_that_is_not_finite_is_refused_though_its_stand_in_is_better(scene: Scene) -> None:
    scene.learn(lambda: scene.trainer.progress.rows >= 100)
    await scene.gate.begin_last_rows(scene.trainer)
    await scene.candidate(more_rows=False, spoil=float("nan"))
    assert scene.current == 1 and "not finite" in (scene.publisher.not_serving or "")


async def test_what_stood_in_beside_a_release_that_is_gone_decides_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.learn(lambda: scene.trainer.progress.rows >= 100)
    await scene.gate.begin_last_rows(scene.trainer)
    assert scene.trainer.stand_in is not None
    monkeypatch.setattr(scene.store, "current", lambda: None)
    await scene.gate.begin_last_rows(scene.trainer)
    assert scene.trainer.stand_in is None


async def test_a_release_that_passed_and_never_became_current_can_be_made_again(scene: Scene) -> None:
    await scene.candidate()
    first, second = scene.store.list()
    scene.store.record_decision(second.release_id, PromotionDecision(passed=True))
    assert scene.publisher._decided_floor(LOG) == first.offsets["behaviours"] != second.offsets["behaviours"]


async def test_releases_that_are_too_old_go_after_a_refusal_too(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    prune = scene.store.prune

    def pruned(**named: Any) -> None:
        prune(**named)
        kept.append(len(scene.store.list()))

    monkeypatch.setattr(scene.store, "prune", pruned)
    await scene.candidate(spoil=float("nan"))
    assert scene.publisher.refused == 1 and kept == [2]


async def test_without_a_serving_release_the_last_rows_are_let_go_and_nothing_stands_in() -> None:
    scene = await Scene(in_memory_registry()).start()
    scene.learn(lambda: scene.trainer.progress.rows >= 16)
    scene.trainer.intake.hold_back(32)
    await scene.gate.begin_last_rows(scene.trainer)
    assert scene.trainer.stand_in is None and scene.trainer.intake._held_back == 0
    await scene.candidate(more_rows=False)
    decision = scene.store.decision(scene.store.list()[0].release_id)
    assert scene.current == 1 and decision is not None and decision.against is None
    assert scene.leads.notices[0].passed and "nothing was compared" in decision.remarks[0]


async def test_a_candidate_that_is_given_up_keeps_the_decision_that_it_had(scene: Scene) -> None:
    await scene.candidate()
    second = scene.store.list()[1].release_id
    scene.store.record_decision(second, PromotionDecision(passed=True, against=scene.store.list()[0].release_id))
    await scene.gate.give_up(scene.trainer, "the log ended")
    assert scene.current == 2 and scene.trainer.shadow is None


async def test_what_is_given_up_says_with_what_and_on_how_many_rows_it_was_compared(scene: Scene) -> None:
    await scene.candidate()
    shadow = scene.trainer.shadow
    assert shadow is not None
    scene.learn(lambda: len(shadow.compared) > 5)
    await scene.gate.give_up(scene.trainer, "the log ended")
    decision = scene.store.decision(scene.store.list()[1].release_id)
    assert decision is not None and decision.rows == len(shadow.compared) and decision.reasons == ["the log ended"]
    assert decision.against == scene.store.list()[0].release_id and scene.publisher.refused == 1
    await scene.gate.give_up(scene.trainer, "again")
    await scene.gate.decide(scene.trainer)
    assert scene.publisher.refused == 1 and len(scene.leads.notices) == 2


async def test_a_refusal_that_was_kept_ends_a_shadow_evaluation_of_a_checkpoint(scene: Scene) -> None:
    await scene.candidate()
    shadow = scene.trainer.shadow
    assert shadow is not None
    state = shadow.snapshot()
    scene.store.record_decision(shadow.candidate.release_id, PromotionDecision(passed=False, reasons=["worse"]))
    scene.trainer.shadow = None
    await PromotionGate(scene.store, scene.publisher, GATE).resume(scene.trainer, state)
    assert scene.trainer.shadow is None and scene.current == 1 and len(scene.leads.notices) == 1


async def test_a_shadow_evaluation_whose_releases_are_gone_is_lost_with_a_line_and_training_goes_on(
    scene: Scene,
) -> None:
    await scene.candidate()
    shadow = scene.trainer.shadow
    assert shadow is not None
    state = shadow.snapshot()
    scene.trainer.shadow = None
    empty = in_memory_registry()
    with capture_logs() as said:
        await PromotionGate(empty, scene.publisher, GATE).resume(scene.trainer, state)
    assert scene.trainer.shadow is None and [line["event"] for line in said] == ["train.trial_lost"]


@pytest.mark.parametrize("about", [{"dim": DIM + 1}, {"encoder_version": "enc-2"}, {"topic_ids": {}}])
async def test_a_current_release_that_goes_with_other_vectors_or_another_log_is_refused(about: dict[str, Any]) -> None:
    store = in_memory_registry()
    releases.release(store, 1, **(OURS | about))
    with pytest.raises(Misconfigured):
        await Scene(store).start()


async def best_of(scene: Scene, best: str | None) -> str | None:
    """The best release that a candidate is compared with where the gate found `best` when it passed the current one."""
    first = scene.store.list()[0].release_id
    await scene.candidate()
    shadow = scene.trainer.shadow
    assert shadow is not None
    passed = PromotionDecision(passed=True, against=first, best=best)
    scene.store.record_decision(shadow.candidate.release_id, passed)
    scene.trainer.shadow = None
    await scene.publisher.carry_out(shadow.candidate, passed)
    await scene.candidate()
    assert scene.trainer.shadow is not None
    return scene.trainer.shadow.against.best


@pytest.mark.parametrize("best", [None, "gone", "other vectors", "other features"])
async def test_without_a_best_release_that_can_score_the_serving_one_is_it(scene: Scene, best: str | None) -> None:
    if best == "gone":
        best = releases.make_manifest(30).release_id
    elif best == "other vectors":
        weights = scene.store.load(scene.store.list()[0].release_id)[0]
        best = releases.publish(scene.store, 30, weights=weights, encoder_version="enc-2", dim=DIM)
    elif best == "other features":
        weights, manifest = scene.store.load(scene.store.list()[0].release_id)
        same = {name: getattr(manifest, name) for name in ("encoder_version", "dim", "config")}
        best = releases.publish(scene.store, 30, weights=weights, features="0" * 16, **same)
    found = await best_of(scene, best)
    current = scene.store.current()
    assert current is not None and found == current.release_id


async def test_a_serving_release_that_cannot_be_scored_here_keeps_nothing_sound_away() -> None:
    store = in_memory_registry()
    releases.release(store, 1, **OURS)  # its weights are those of no model
    scene = await Scene(store).start()
    with capture_logs() as said:
        await scene.candidate()
    assert scene.current == 2 and "train.not_compared" in [line["event"] for line in said]
