"""Candidates, shadow evaluations and the pointer: a release is compared with the one it replaces, whatever fails."""

from __future__ import annotations

import pytest

from schemas.errors import StoreUnavailable
from schemas.manifests import PromotionDecision
from streams.stores.artifacts.artifact_store import InMemoryArtifactStore
from streams.stores.artifacts.config import ModelStoreConfig
from streams.stores.artifacts.registry import ModelRegistry, in_memory_registry
from streams.training.promotion_gate import PromotionGate
from tests.factories import releases
from tests.factories.promotion import GATE, LOG, Scene
from tests.factories.samples import DIM, make_trainer, small_config


class Flaky(ModelRegistry):
    """A store that may be away when a decision is to be kept."""

    away = False

    def __init__(self) -> None:
        self.artifacts = InMemoryArtifactStore()
        super().__init__(self.artifacts, ModelStoreConfig(), named="memory")

    def record_decision(self, release_id: str, decision: PromotionDecision) -> PromotionDecision:
        if self.away:
            raise StoreUnavailable("store", "away")
        return super().record_decision(release_id, decision)


@pytest.fixture
async def scene() -> Scene:
    """The first release is served."""
    made = await Scene(Flaky()).start()
    await made.candidate()
    assert made.current == 1
    return made


async def test_a_candidate_is_served_only_after_its_shadow_evaluation(scene: Scene) -> None:
    await scene.candidate()
    assert scene.trainer.shadow is not None and scene.current == 1 and len(scene.leads.notices) == 1
    await scene.decide()
    assert scene.current == 2 and scene.trainer.shadow is None and scene.publisher.released == 2
    decision = scene.store.decision(scene.store.list()[1].release_id)
    assert decision is not None and decision.passed and decision.rows >= 32
    assert decision.against == scene.store.list()[0].release_id


async def test_a_worse_candidate_is_kept_and_announced_and_the_next_is_compared_with_the_serving_release(
    scene: Scene,
) -> None:
    await scene.candidate(spoil=-30.0)
    await scene.decide()
    assert scene.current == 1 and scene.publisher.refused == 1
    assert [notice.passed for notice in scene.leads.notices] == [True, False]
    await scene.candidate()
    assert scene.trainer.shadow is not None and scene.trainer.shadow.against.serving == scene.store.list()[0].release_id
    assert scene.store.list()[2].parent == scene.store.list()[0].release_id


async def test_what_is_not_finite_is_refused_without_a_shadow_evaluation(scene: Scene) -> None:
    await scene.candidate(spoil=float("nan"))
    assert scene.trainer.shadow is None and scene.current == 1 and scene.publisher.refused == 1


async def test_a_store_that_is_away_when_it_is_decided_is_asked_again(scene: Scene) -> None:
    await scene.candidate()
    assert isinstance(scene.store, Flaky)
    scene.store.away = True
    with pytest.raises(StoreUnavailable):
        await scene.decide()
    assert scene.trainer.shadow is not None and scene.current == 1
    scene.store.away = False
    await scene.decide()
    assert scene.current == 2


async def test_a_rollback_meanwhile_keeps_the_candidate_back_though_it_is_better(scene: Scene) -> None:
    await scene.candidate()
    await scene.decide()
    await scene.candidate()
    first = scene.store.list()[0].release_id
    scene.store.choose(first, seen=scene.store.current(), rollback=True, why=None)
    await scene.decide()
    assert scene.current == 1 and scene.publisher.held == 1
    scene.store.pin(False, why=None)
    await scene.candidate()  # and the next one is compared with what a person chose
    await scene.decide()
    assert scene.current == 4


async def test_another_choice_meanwhile_is_not_overruled_by_a_comparison_with_what_was_served_before(
    scene: Scene,
) -> None:
    await scene.candidate()
    await scene.decide()
    await scene.candidate()
    scene.store.choose(scene.store.list()[0].release_id, seen=scene.store.current(), rollback=False, why=None)
    await scene.decide()
    assert scene.current == 1 and scene.publisher.held == 1


async def test_a_damaged_serving_release_keeps_nothing_sound_away(scene: Scene) -> None:
    current = scene.store.current()
    assert current is not None
    assert isinstance(scene.store, Flaky)
    scene.store.artifacts.delete(current.release_id)
    await scene.candidate()
    assert scene.trainer.shadow is None and scene.current == 2


@pytest.mark.parametrize("more_rows", [True, False])
async def test_a_serving_release_of_other_features_keeps_nothing_away_and_scores_no_row(
    scene: Scene, more_rows: bool
) -> None:
    anew = await Scene(scene.store).start()
    anew.trainer = make_trainer(small_config(release_every_rows=128, features={"numbers": ["price"]}))
    if not more_rows:
        anew.learn(lambda: anew.trainer.progress.rows >= 64)
        await anew.gate.begin_last_rows(anew.trainer)
    await anew.candidate(more_rows=more_rows)
    assert anew.trainer.shadow is None and anew.trainer.stand_in is None and anew.current == 2


async def test_a_candidate_that_is_made_again_after_a_restart_keeps_number_and_decision(scene: Scene) -> None:
    made = await scene.candidate()
    await scene.decide()
    first, second = (manifest.release_id for manifest in scene.store.list())
    assert {manifest.features for manifest in scene.store.list()} == {scene.trainer.config.features.version}
    scene.store.choose(first, seen=scene.store.current(), rollback=True, why="bad on phones")
    scene.store.pin(False, why=None)

    again = await Scene(scene.store).start()
    await again.gate.admit(again.trainer, made, {"behaviours": {0: 10**6}})
    assert [manifest.release_id for manifest in again.store.list()] == [first, second]
    assert again.current == 1 and again.trainer.shadow is None  # what a person took back does not come back by itself
    assert not again.publisher.beyond_current(scene.store.list()[1].offsets["behaviours"])


async def test_a_shadow_evaluation_goes_on_after_a_restart_and_a_decision_not_carried_out_is(scene: Scene) -> None:
    await scene.candidate()
    shadow = scene.trainer.shadow
    assert shadow is not None
    scene.learn(lambda: len(shadow.compared) > 10)
    state = shadow.snapshot()
    scene.trainer.shadow = None
    await PromotionGate(scene.store, scene.publisher, GATE).resume(scene.trainer, state)
    assert scene.trainer.shadow is not None and len(scene.trainer.shadow.compared) == len(shadow.compared)

    # killed between decision and promotion
    scene.store.record_decision(
        shadow.candidate.release_id, PromotionDecision(passed=True, against=shadow.against.serving)
    )
    scene.trainer.shadow = None
    await PromotionGate(scene.store, scene.publisher, GATE).resume(scene.trainer, state)
    assert scene.current == 2 and scene.trainer.shadow is None


async def test_candidates_in_quick_succession_are_compared_too() -> None:
    quick = await Scene(in_memory_registry(), release_every_rows=16).start()
    await quick.candidate()
    await quick.candidate()
    assert quick.trainer.shadow is not None and quick.current == 1
    await quick.decide()
    decision = quick.store.decision(quick.store.list()[1].release_id)
    assert decision is not None and decision.rows >= 32


async def test_the_last_candidate_of_a_log_is_compared_on_its_last_rows(scene: Scene) -> None:
    scene.learn(lambda: scene.trainer.progress.rows >= 100)
    await scene.gate.begin_last_rows(scene.trainer)
    await scene.candidate(more_rows=False)
    decision = scene.store.decision(scene.store.list()[1].release_id)
    assert decision is not None and decision.against == scene.store.list()[0].release_id
    assert 16 < decision.rows < 64 and decision.figures["serving_logloss"] is not None
    assert scene.current == (2 if decision.passed else 1)


async def test_a_last_candidate_whose_stand_in_is_worse_is_refused(scene: Scene) -> None:
    scene.spoil_weights(-30.0)
    await scene.gate.begin_last_rows(scene.trainer)
    await scene.candidate(more_rows=False)
    assert scene.current == 1 and scene.publisher.refused == 1
    assert scene.publisher.not_serving is not None and "was refused: log-loss" in scene.publisher.not_serving


async def test_a_candidate_that_is_compared_when_the_last_rows_begin_is_given_up_for_the_last_one(scene: Scene) -> None:
    await scene.candidate()
    await scene.gate.begin_last_rows(scene.trainer)
    decision = scene.store.decision(scene.store.list()[1].release_id)
    assert scene.trainer.shadow is None and decision is not None and not decision.passed
    assert "the log ended" in decision.reasons[0]
    assert scene.trainer.stand_in is not None and scene.trainer.stand_in.against.serving[1:7] == "000001"


async def test_a_trainer_that_begins_anew_does_not_replace_what_learned_more_without_a_comparison(scene: Scene) -> None:
    scene.learn(lambda: scene.trainer.progress.rows >= 128)
    await scene.candidate(more_rows=False)  # as much again, of the same trainer
    assert scene.current == 2
    anew = await Scene(scene.store, release_every_rows=32).start()
    await anew.candidate(more_rows=False)
    decision = scene.store.decision(scene.store.list()[-1].release_id)
    assert anew.current == 2 and decision is not None and "rows fewer than r000002" in decision.reasons[0]


async def test_a_candidate_is_compared_with_the_best_release_where_the_serving_one_is_not_it(scene: Scene) -> None:
    first = scene.store.list()[0].release_id
    await scene.candidate()
    shadow = scene.trainer.shadow
    assert shadow is not None and shadow.against.best == first
    passed = PromotionDecision(passed=True, against=first, best=first)
    scene.store.record_decision(shadow.candidate.release_id, passed)
    scene.trainer.shadow = None
    await scene.publisher.carry_out(shadow.candidate, passed)
    await scene.candidate()
    assert scene.trainer.shadow is not None
    assert (scene.trainer.shadow.against.serving[1:7], scene.trainer.shadow.against.best) == ("000002", first)
    # kept in the checkpoint
    state = scene.trainer.shadow.snapshot()
    scene.trainer.shadow = None
    await scene.gate.resume(scene.trainer, state)
    assert scene.trainer.shadow is not None and scene.trainer.shadow.against.best == first


async def test_a_release_that_a_person_chose_against_the_gate_is_measured_by_itself(scene: Scene) -> None:
    first = scene.store.list()[0].release_id
    await scene.candidate()
    shadow = scene.trainer.shadow
    assert shadow is not None
    refused = PromotionDecision(passed=False, reasons=["worse"], against=first, best=first)
    scene.store.record_decision(shadow.candidate.release_id, refused)
    scene.trainer.shadow = None
    scene.store.choose(shadow.candidate.release_id, seen=scene.store.current(), rollback=False, why=None)
    await scene.candidate()
    assert scene.trainer.shadow is not None and scene.trainer.shadow.against.best[1:7] == "000002"


@pytest.mark.parametrize(
    ("offsets", "beyond"),
    [
        ({0: 101, 1: 50}, True),
        ({0: 100, 1: 51}, True),
        ({0: 100, 1: 50}, False),
        ({0: 999, 1: 49}, False),  # ahead in one partition is not enough
        ({0: 999}, False),
        ({0: 100, 1: 50, 2: 1}, True),
    ],
)
@pytest.mark.parametrize("last", ["current", "rolled back", "refused"])
async def test_only_what_goes_further_than_the_newest_release_that_was_decided_about_is_released(
    last: str, offsets: dict[int, int], beyond: bool
) -> None:
    store, log = in_memory_registry(), {"cluster_id": LOG.cluster_id, "topic_ids": LOG.topic_ids}
    earlier = releases.release(store, 1, encoder_version="enc-1", dim=DIM, offsets={"behaviours": {0: 9, 1: 9}}, **log)
    place = {"behaviours": {0: 100, 1: 50}}
    newest = releases.publish(store, 2, encoder_version="enc-1", dim=DIM, offsets=place, **log)
    if last == "refused":
        store.record_decision(newest, PromotionDecision(passed=False, reasons=["worse"]))
    else:
        store.promote(newest, None)
    if last == "rolled back":
        store.choose(earlier, seen=store.current(), rollback=True, why=None)
    # neither one that nobody decided about, nor one of another log, is a limit
    further = {"behaviours": {0: 10**6, 1: 10**6}}
    releases.publish(store, 3, offsets=further, **log)
    other = releases.publish(store, 4, offsets=further, cluster_id="another", topic_ids={})
    store.record_decision(other, PromotionDecision(passed=False, reasons=["worse"]))
    publisher = (await Scene(store).start()).publisher
    assert publisher.beyond_current(offsets) is beyond


async def test_a_stand_in_decides_about_the_last_candidate_alone(scene: Scene) -> None:
    await scene.gate.begin_last_rows(scene.trainer)
    assert scene.trainer.stand_in is not None
    await scene.candidate()
    assert scene.trainer.shadow is not None and scene.trainer.shadow is not scene.trainer.stand_in
    assert scene.current == 1 and scene.store.decision(scene.store.list()[1].release_id) is None


async def test_the_last_candidate_is_compared_on_all_rows_that_follow_its_stand_in(scene: Scene) -> None:
    await scene.gate.begin_last_rows(scene.trainer)
    await scene.candidate(more_rows=False)
    decision = scene.store.decision(scene.store.list()[1].release_id)
    assert decision is not None and decision.rows == 64 == 2 * GATE.trial_rows
