"""Configuration of pre-training and C-SFT; imports no torch, so that settings load quickly."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.behaviours import BehaviourKind


class CsftConfig(BaseModel):
    """C-SFT: behaviour pairs, three-level InfoNCE, space-time negatives."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seed: int = 20250201
    """Seed of every random choice."""
    epochs: int = Field(default=4, ge=1, le=1_000)
    """Passes over the pairs."""
    batch_pairs: int = Field(default=512, ge=2)
    """Pairs per optimiser step, over all workers together."""
    learning_rate: float = Field(default=3e-3, gt=0, le=1e-2)
    """Largest step size, reached after the warm-up and followed by a cosine decay."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay."""
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps over which the step size rises from zero."""
    max_gradient_norm: float = Field(default=5.0, gt=0)
    """Gradients are scaled down to this norm."""
    anchor_items: int = Field(default=3, ge=1, le=50)
    """How many of the user's latest items form the anchor of a pair; 1 is the trigger item alone."""
    anchor_decay: float = Field(default=0.7, gt=0, le=1)
    """Weight of each earlier item of the anchor relative to the one after it."""
    anchor_drop: float = Field(default=0.5, ge=0, lt=1)
    """Probability of shortening an anchor to one of its items, so that queries of one item are trained too."""
    purchase_weight: float = Field(default=1.0, ge=0)
    """Weight of a purchase as a positive."""
    cart_weight: float = Field(default=0.5, ge=0)
    """Weight of a cart as a positive."""
    click_weight: float = Field(default=0.25, ge=0)
    """Weight of a click as a positive."""
    fused_level: float = Field(default=1.0, ge=0)
    """Weight of the loss from query to fused item."""
    image_level: float = Field(default=0.1, ge=0)
    """Weight of the loss from query to picture."""
    title_level: float = Field(default=0.1, ge=0)
    """Weight of the loss from query to title."""
    nested_level: float = Field(default=0.25, ge=0)
    """Weight of the fused loss for each nested width."""
    anchor_view: Literal["fused", "same"] = "fused"
    """The query of a trigger item: its fused vector, or for each level its own view of that level."""
    hard_negatives: bool = True
    """Whether each pair has one negative of its own: shown and not taken, else of the same category."""
    hard_loss: Literal["info_nce", "triplet"] = "info_nce"
    """Where the hard negative counts: among the other negatives, or in a hinge loss of its own."""
    triplet_margin: float = Field(default=0.1, ge=0)
    """Margin of that hinge, in cosine."""
    triplet_weight: float = Field(default=1.0, ge=0)
    """Weight of that hinge."""
    masks: bool = True
    """Whether false negatives are masked (same content, same search, taken by the user); the positive always is."""
    space_negatives: int = Field(default=0, ge=0)
    """Items drawn from the latest takes of all users for each step, beside the batch itself."""
    window_takes: int = Field(default=1024, ge=1)
    """How many latest takes that window contains; older ones move to the bank."""
    time_negatives: int = Field(default=0, ge=0)
    """Items drawn from the bank for each step; 0 switches the bank off."""
    bank_takes: int = Field(default=8192, ge=1, le=1 << 20)
    """Most takes in the bank."""
    bank_seconds: float = Field(default=90 * 24 * 3600.0, gt=0)
    """Oldest take in the bank, in event time."""
    bank_steps: int = Field(default=1_000, ge=1)
    """Oldest take in the bank, in steps."""
    bank_rows: Literal["projected", "stored"] = "projected"
    """Whether bank items are projected with the current heads and have gradients, or are stored outputs of a momentum
    encoder (MoCo)."""
    momentum: float = Field(default=0.99, ge=0, lt=1)
    """Share of the momentum encoder's weights that each step keeps, where bank rows are stored."""
    bank_age_half_life_steps: float = Field(default=200.0, gt=0)
    """Age in steps at which a stored row counts half as a negative."""
    bank_warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps before the bank is used."""
    log_q_strength: float = Field(default=0.5, ge=0, le=1)
    """Share of the sampling correction that is applied: 0 for vectors of a click model, 1 for plain recall."""
    temperature: float = Field(default=0.1, gt=0)
    """Temperature at the start."""
    learn_temperature: bool = True
    """Whether the temperature is learned."""
    temperature_learning_rate: float = Field(default=0.03, gt=0, le=1)
    """Largest step size of its logarithm."""
    min_temperature: float = Field(default=0.02, gt=0)
    """Lower bound of the temperature."""
    max_temperature: float = Field(default=0.5, gt=0)
    """Upper bound of the temperature."""
    drop_image: float = Field(default=0.3, ge=0, lt=1)
    """Probability of hiding the picture of an item that has a title, so that missing pictures are trained."""
    drop_text: float = Field(default=0.3, ge=0, lt=1)
    """Probability of hiding the title of an item that has a picture."""
    drop_attributes: float = Field(default=0.3, ge=0, lt=1)
    """Probability of hiding the further attributes of an item, so that items without any are trained."""
    drop_features: float = Field(default=0.1, ge=0, lt=1)
    """Dropout probability of each principal component of an item's features."""
    centred: bool = True
    """Whether vectors are centred. Without it popularity may become a direction of its own: plain recall among known
    items rises, but the space collapses into a cone and new items are not retrieved."""
    centre_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Share of the running means of the vectors that each step keeps."""
    shuffle_seconds: float = Field(default=float(1 << 40), gt=0)
    """Pairs are shuffled inside blocks of this length of event time; by default there is one block."""
    history_length: int = Field(default=50, ge=1, le=1_000)
    """Takes of a user that are kept for anchors and for masks."""
    max_logit_bytes: int = Field(default=1 << 26, ge=1 << 16)
    """Largest block of logits computed at a time."""
    collapse_cosine: float = Field(default=0.5, gt=0, le=1)
    """Mean pairwise cosine above which the space counts as collapsed."""
    collapse_loss_share: float = Field(default=0.98, gt=0, le=1)
    """Share of ln(number of negatives + 1) above which an uncorrected loss counts as untrained."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if not self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError("temperature must lie between min_temperature and max_temperature")
        return self

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if not (self.fused_level or self.image_level or self.title_level):
            raise ValueError("one of fused_level, image_level and title_level must be above 0, or nothing is learned")
        if not (self.purchase_weight or self.cart_weight or self.click_weight):
            raise ValueError("one of purchase_weight, cart_weight and click_weight must be above 0, or nothing counts")
        if self.hard_loss == "triplet" and not self.hard_negatives:
            raise ValueError("hard_loss=triplet compares with the hard negatives, and hard_negatives is off")
        if self.bank_rows == "stored" and self.space_negatives:
            raise ValueError("bank_rows=stored keeps no window of latest takes: leave out space_negatives")
        if self.bank_rows == "stored" and not self.time_negatives:
            raise ValueError("bank_rows=stored has no effect without time_negatives")
        return self

    def weight_of(self, kind: BehaviourKind) -> float:
        """Weight of a positive of this kind."""
        return {
            BehaviourKind.PURCHASE: self.purchase_weight,
            BehaviourKind.CART: self.cart_weight,
            BehaviourKind.CLICK: self.click_weight,
        }.get(kind, 0.0)

    def as_scl(self) -> CsftConfig:
        """SCL of Taobao display: a loss per modality, MoCo bank, triplet loss on exposures that were not taken.

        Source: arXiv 2407.19467, semantic-aware contrastive learning.
        """
        return self.model_copy(
            update={
                "fused_level": 0.0,
                "nested_level": 0.0,
                "image_level": 1.0,
                "title_level": 1.0,
                "anchor_view": "same",
                "anchor_items": 1,
                "hard_loss": "triplet",
                "space_negatives": 0,
                "time_negatives": self.bank_takes,
                "bank_rows": "stored",
                "log_q_strength": 0.0,
                "drop_image": 0.0,
                "drop_text": 0.0,
                "drop_attributes": 0.0,
                "drop_features": 0.0,
            }
        )


class PretrainConfig(BaseModel):
    """Image-title alignment."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seed: int = 20250201
    """Seed of every random choice."""
    epochs: int = Field(default=3, ge=1, le=1_000)
    """Passes over the items."""
    batch_items: int = Field(default=512, ge=2)
    """Items per optimiser step."""
    learning_rate: float = Field(default=5e-4, gt=0, le=1e-2)
    """Largest step size, with a cosine decay."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay."""
    temperature: float = Field(default=0.1, gt=0)
    """Temperature of both terms."""
    missing_weight: float = Field(default=0.5, ge=0)
    """Weight of the loss between an item and itself with one modality hidden."""
