"""C-SFT: trains heads and fusion on the users' next takes, against space-time negatives.

Source: MIM (arXiv 2502.00321), figures 2b and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from encoders.fusion import ItemFusion, ItemSource, nested_unit
from trainer.csft.config import CsftConfig
from trainer.csft.pair_batches import PairBatch, pair_batch
from trainer.csft.pairs import HardNegatives, Pair
from trainer.csft.workers import Workers
from trainer.negatives.memory_bank import SpaceTimeMemory
from trainer.negatives.sampler import SpaceTimeSampler, TakeCounts
from trainer.networks.losses import NonFiniteLoss, chunked_info_nce, triplet
from trainer.samples.numbering import ItemNumbers
from trainer.samples.rows import Impression, Take

# P = pairs of a batch, A = items of an anchor, K = candidates, U = distinct items with gradient, D = width
IMAGE, TITLE, FUSED = 0, 1, 2


@dataclass(frozen=True)
class CsftReport:
    """Result of one step."""

    step: int
    pairs: int
    candidates: int
    """Distinct candidates of each query, without the hard negative."""
    loss: float
    levels: dict[str, float]
    """Mean loss of each level."""
    loss_share: float
    """Fused loss over ln(candidates + 1): near 1 for an untrained space (meaningful without logQ correction)."""
    temperature: float


class CsftTrainer:
    """One model with its optimiser and memory, changed by `step`; `snapshot` and `restore` resume a run.

    `items` gives the features of all items by number (row 0 is padding), from memory or computed by `towers` that are
    trained too; `catalogue` lists the items to centre on (by default all). Randomness is seeded by the configuration;
    no clock is read.
    """

    def __init__(
        self,
        config: CsftConfig,
        fusion: ItemFusion,
        items: ItemSource,
        numbers: ItemNumbers,
        *,
        total_steps: int,
        counts: TakeCounts,
        hard_negatives: HardNegatives,
        catalogue: NDArray[np.int64] | None = None,
        workers: Workers | None = None,
        towers: nn.Module | None = None,
        tower_learning_rate: float = 1e-4,
    ) -> None:
        self.config = config
        self.fusion = fusion
        self.towers = towers
        self._items = items
        self._numbers = numbers
        self._total_steps = max(1, total_steps)
        self._counts = counts
        self._hard = hard_negatives
        self._catalogue = np.arange(1, len(items)) if catalogue is None else catalogue
        self._workers = workers or Workers.current()
        stored = config.bank_rows == "stored"
        self._memory = SpaceTimeMemory(
            window_seconds=config.bank_seconds,
            window_takes=config.window_takes if config.space_negatives else 1,
            bank_takes=config.bank_takes,
            bank_seconds=config.bank_seconds,
            bank_steps=config.bank_steps,
            vector_width=3 * fusion.dim if stored else 0,
        )
        self._momentum = _copy_of(fusion) if stored else None
        self.log_temperature = nn.Parameter(torch.tensor(float(np.log(config.temperature))))
        self._parameters = [p for p in fusion.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": self._parameters, "weight_decay": config.weight_decay, "peak": config.learning_rate}
        ]
        if config.learn_temperature:
            rate = config.temperature_learning_rate
            groups.append({"params": [self.log_temperature], "weight_decay": 0.0, "peak": rate})
        if towers is not None:
            learning = [p for p in towers.parameters() if p.requires_grad]
            groups.append({"params": learning, "weight_decay": config.weight_decay, "peak": tower_learning_rate})
            self._parameters = [*self._parameters, *learning]
        self._optimiser = torch.optim.AdamW(groups, lr=config.learning_rate)
        self._rng = np.random.default_rng(config.seed)
        self._dropping = torch.Generator().manual_seed(config.seed)
        self.steps = 0

    @property
    def temperature(self) -> Tensor:
        """The current temperature, inside its bounds."""
        low, high = np.log(self.config.min_temperature), np.log(self.config.max_temperature)
        return self.log_temperature.clamp(low, high).exp()

    # ---- one step ------------------------------------------------------------------------------------------------

    def step(self, pairs: Sequence[Pair]) -> CsftReport | None:
        """Train on one batch; None if no pair of it is usable. Raises `NonFiniteLoss` before any weight changes."""
        batch = self._plan(pairs)
        if batch is None:
            return None
        self._set_learning_rate()
        levels, loss = self._loss(batch)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(f"loss is {loss.item()} at step {self.steps}; lower the learning rate")
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        learned = [*self._parameters, self.log_temperature]
        self._workers.sum_gradients(learned)
        nn.utils.clip_grad_norm_(self._parameters, self.config.max_gradient_norm)
        self._optimiser.step()
        with torch.no_grad():
            low, high = np.log(self.config.min_temperature), np.log(self.config.max_temperature)
            self.log_temperature.clamp_(low, high)  # outside its bounds it would have no gradient
        self._after_step(pairs, batch)
        means = {name: self._workers.sum_number(float(value)) for name, value in levels.items()}
        shown = means.get("fused", next(iter(means.values()), 0.0))
        return CsftReport(
            step=self.steps,
            pairs=len(batch.plan.rows),
            candidates=len(batch.plan.candidates),
            loss=self._workers.sum_number(float(loss.detach())),
            levels=means,
            loss_share=shown / float(np.log(len(batch.plan.candidates) + 1)),
            temperature=float(self.temperature.detach()),
        )

    def _plan(self, pairs: Sequence[Pair]) -> PairBatch | None:
        config = self.config
        rows: list[Impression] = [pair.row for pair in pairs]
        warm = self.steps >= config.bank_warmup_share * self._total_steps
        sampler = SpaceTimeSampler(
            space=config.space_negatives if warm else 0,
            time=config.time_negatives if warm else 0,
            masks=config.masks,
            needs_history=False,  # a pair has an anchor of its own
        )
        plan = sampler.plan(rows, self._memory, self._counts, self._numbers, self._rng)
        if plan is None:
            return None
        return pair_batch([pairs[i] for i in plan.rows], plan, config, self._hard, self._rng)

    def _set_learning_rate(self) -> None:
        progress = min(1.0, self.steps / self._total_steps)
        warmup = self.config.warmup_share
        rising = min(1.0, (self.steps + 1) / max(1.0, warmup * self._total_steps))
        falling = 0.5 * (1 + np.cos(np.pi * max(0.0, (progress - warmup) / (1 - warmup))))
        for group in self._optimiser.param_groups:
            group["lr"] = group["peak"] * rising * max(0.02, falling)

    # ---- the loss ------------------------------------------------------------------------------------------------

    def _loss(self, batch: PairBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Each level's mean loss over all pairs (this worker's part of the sum), and their weighted sum."""
        config, plan = self.config, batch.plan
        positives = np.unique(plan.positives)
        # rows of the current heads have gradients like all others; rows stored by a momentum encoder have none
        fresh = np.isin(plan.candidates, positives) | (self._momentum is None)
        learned = np.unique(np.concatenate([batch.anchors_PA.ravel(), positives, batch.hard_P, plan.candidates[fresh]]))
        learned = learned[learned > 0]
        views_U3D = self._views(self.fusion, learned)

        def position(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.minimum(np.searchsorted(learned, numbers), len(learned) - 1)

        others_K3D, log_weight = self._stored(plan.candidates[~fresh])
        order = np.concatenate([np.flatnonzero(fresh), np.flatnonzero(~fresh)])
        fresh_rows = torch.from_numpy(position(plan.candidates[fresh]))
        candidates_K3D = torch.cat([views_U3D[fresh_rows], others_K3D])
        allowed_PK = torch.from_numpy(plan.allowed[:, order])
        strength = config.log_q_strength
        candidate_log_q = strength * torch.from_numpy(plan.log_q[order])
        candidate_log_q[len(fresh_rows) :] -= log_weight
        positive_log_q = strength * torch.from_numpy(plan.positive_log_q)

        own = self._workers.share_of(len(plan.rows))
        query_P3D = self._queries(batch, views_U3D, position)[own]
        positive_P3D = views_U3D[torch.from_numpy(position(plan.positives))][own]
        has_hard = torch.from_numpy(batch.hard_P > 0)[own]
        hard_P3D = views_U3D[torch.from_numpy(position(batch.hard_P))][own]
        weights = torch.from_numpy(batch.weights_P)
        shares = (weights / weights.sum().clamp_min(1e-9))[own]
        temperature = self.temperature

        levels: dict[str, Tensor] = {}
        total = query_P3D.sum() * 0.0 + temperature * 0.0
        in_loss = config.hard_loss == "info_nce"

        def level(query: Tensor, positive: Tensor, candidate: Tensor, hard: Tensor) -> Tensor:
            # a missing view is a zero row: it is no positive, no negative and no query
            usable = _present(query) & _present(positive)
            loss_P = chunked_info_nce(
                query,
                positive,
                candidate,
                allowed_PK[own] & _present(candidate)[None, :],
                temperature=temperature,
                positive_log_q_P=positive_log_q[own],
                candidate_log_q_K=candidate_log_q,
                hard_PD=hard if in_loss else None,
                hard_allowed_P=has_hard & _present(hard),
                # chosen for this pair, not drawn by popularity: it gets the correction of the positive
                hard_log_q_P=positive_log_q[own],
                max_logits=config.max_logit_bytes // 4,
            )
            if not in_loss:
                allowed = has_hard & _present(hard)
                loss_P = loss_P + config.triplet_weight * triplet(
                    query, positive, hard, allowed, margin=config.triplet_margin
                )
            return (loss_P * shares * usable).sum()

        for name, view, weight in (
            ("image", IMAGE, config.image_level),
            ("title", TITLE, config.title_level),
            ("fused", FUSED, config.fused_level),
        ):
            if weight:
                at = (slice(None), view)
                loss = level(query_P3D[at], positive_P3D[at], candidates_K3D[at], hard_P3D[at])
                levels[name] = loss.detach()
                total = total + weight * loss
        if config.nested_level and config.fused_level:
            widths = self.fusion.config.nested_widths
            sides = [
                nested_unit(rows[:, FUSED], widths) for rows in (query_P3D, positive_P3D, candidates_K3D, hard_P3D)
            ]
            for w, width in enumerate(widths):
                loss = level(*(side[w] for side in sides))
                levels[f"fused_{width}"] = loss.detach()
                total = total + config.nested_level * loss
        return levels, total

    def _views(self, fusion: ItemFusion, items: NDArray[np.int64]) -> Tensor:
        """(U, 3, D) views of items, some with a modality hidden; each worker computes its share.

        All rows of a loss get the same noise; otherwise the noise would tell positives from negatives.
        """
        config = self.config
        drop = torch.rand(len(items), generator=self._dropping)
        rows = torch.from_numpy(items)
        both = self._items.has_text_N[rows] & self._items.has_image_N[rows]
        drop_image = both & (drop < config.drop_image)
        drop_text = both & (drop > 1 - config.drop_text)
        own = self._workers.share_of(len(items))
        given = self._items.select(rows[own])
        if config.drop_attributes and fusion.config.attribute_rows:
            hidden = (torch.rand(len(items), generator=self._dropping) < config.drop_attributes)[own]
            given = replace(given, words_NA=given.words_NA.masked_fill(hidden[:, None], -1))
        if config.drop_features:
            # drawn for all rows, so that every worker's generator stays in step
            given = replace(
                given,
                text_NR=given.text_NR * self._kept(len(items), given.text_NR.shape[1])[own],
                image_NR=given.image_NR * self._kept(len(items), given.image_NR.shape[1])[own],
            )
        views = fusion(given, drop_text_N=drop_text[own], drop_image_N=drop_image[own])
        stacked = torch.stack([views.image_ND, views.title_ND, views.fused_ND], 1)
        return self._workers.gather(stacked, len(items))

    def _kept(self, rows: int, width: int) -> Tensor:
        """(rows, width) dropout mask: zeros where a feature is hidden, else the scale that keeps the expectation."""
        share = self.config.drop_features
        return (torch.rand(rows, width, generator=self._dropping) >= share).float() / (1 - share)

    def _stored(self, items: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(K, 3, D) stored rows of the momentum encoder, and the log weight (K,) of each by its age."""
        if not len(items):
            return torch.zeros(0, 3, self.fusion.dim), torch.zeros(0)
        vectors, ages = self._memory.bank.newest_rows(items, step=self.steps)
        log_weight = -np.log(2.0) * ages / self.config.bank_age_half_life_steps
        return (
            torch.from_numpy(vectors).view(len(items), 3, self.fusion.dim),
            torch.from_numpy(log_weight.astype(np.float32)),
        )

    def _queries(self, batch: PairBatch, views_U3D: Tensor, position: Any) -> Tensor:
        """(P, 3, D) the query of each level."""
        weights_PA = torch.from_numpy(batch.anchor_weights_PA)
        anchors = views_U3D[torch.from_numpy(position(batch.anchors_PA))]
        mean_P3D = F.normalize((anchors * weights_PA[:, :, None, None]).sum(1), dim=-1, eps=1e-6)
        if self.config.anchor_view == "same":
            return mean_P3D
        view_P = torch.from_numpy(batch.anchor_views_P)
        query_PD = mean_P3D[torch.arange(len(view_P)), view_P]
        return query_PD[:, None].expand(-1, 3, -1)

    # ---- after a step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _after_step(self, pairs: Sequence[Pair], batch: PairBatch) -> None:
        config = self.config
        self.steps += 1
        self._memory.step = self.steps
        some = self._rng.choice(self._catalogue, 256)
        if config.centred:
            self.fusion.centre_on(self._items.select(torch.from_numpy(some)), momentum=config.centre_momentum)
        if not (config.time_negatives or config.space_negatives):
            return
        if self._momentum is None:
            for pair in pairs:
                self._memory.add(pair.take)
            return
        for slow, fast in zip(self._momentum.state_dict().values(), self.fusion.state_dict().values(), strict=True):
            if slow.is_floating_point():
                slow.lerp_(fast, 1 - config.momentum)
        usable = [pair for pair in pairs if self._numbers.has_vector(pair.row.item)]
        if not usable:
            return
        rows = np.array([pair.row.item for pair in usable], np.int64)
        vectors = self._views(self._momentum, rows).flatten(1).numpy()
        for pair, vector in zip(usable, vectors, strict=True):
            self._memory.bank.add(pair.take, step=self.steps, vector=vector)

    @torch.no_grad()
    def finish(self) -> None:
        """Centre on the whole catalogue, after the last step."""
        if self.config.centred:
            self.fusion.centre_on(self._items.select(torch.from_numpy(self._catalogue)))

    # ---- checkpoint ----------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """All mutable state: weights, optimiser, memory, generators, step."""
        return {
            "fusion": deepcopy(self.fusion.state_dict()),
            "towers": None if self.towers is None else _trained_state(self.towers),
            "momentum": None if self._momentum is None else deepcopy(self._momentum.state_dict()),
            "log_temperature": self.log_temperature.detach().clone(),
            "optimiser": deepcopy(self._optimiser.state_dict()),
            "memory": self._memory.snapshot(),
            "rng": self._rng.bit_generator.state,
            "dropping": self._dropping.get_state(),
            "steps": self.steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Return to the state of `snapshot`: further steps are bit-identical on the same machine."""
        self.fusion.load_state_dict(state["fusion"])
        if self.towers is not None:
            self.towers.load_state_dict(state["towers"], strict=False)
        if self._momentum is not None:
            self._momentum.load_state_dict(state["momentum"])
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])
        self._optimiser.load_state_dict(deepcopy(state["optimiser"]))
        self._memory.restore(state["memory"])
        self._rng.bit_generator.state = state["rng"]
        self._dropping.set_state(state["dropping"])
        self.steps = int(state["steps"])


def take_counts(takes: Sequence[Take]) -> TakeCounts:
    """Takes per item of a closed span, without decay: the distribution of in-batch sampling."""
    counts = TakeCounts(half_life_seconds=1e12)
    for take in takes:
        counts.add(take.item, take.second)
    return counts


def _trained_state(towers: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in towers.named_parameters() if p.requires_grad}


def _present(rows_ND: Tensor) -> Tensor:
    return rows_ND.detach().abs().sum(-1) > 0


def _copy_of(fusion: ItemFusion) -> ItemFusion:
    copied = ItemFusion(fusion.config, text_width=fusion.text_width, image_width=fusion.image_width)
    copied.load_state_dict(fusion.state_dict())
    return copied.requires_grad_(False)
