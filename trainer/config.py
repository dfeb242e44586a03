"""Configuration of the trainer and of the network; free of torch, so that reading settings stays quick."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CiUBMConfig(BaseModel):
    """Size and parts of the model. Every interest can be switched off, so that an ablation is a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id_width: int = Field(default=16, ge=1)
    """Width of an item-id embedding."""
    id_rows: int = Field(default=1 << 15, ge=8, multiple_of=8)
    """Most ids with an embedding of their own; when the table is full, those not named for longest lose theirs."""
    id_admit_after: int = Field(default=2, ge=1)
    """In how many batches an id has to be named before it gets an embedding of its own; until then it reads the one
    that all newcomers share."""
    id_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a batch's items that are treated as newcomers in training (as in DropoutNet): what is learned then holds
    without their ids too, and ids are not learned by heart."""
    categories: int = Field(default=0, ge=0)
    """Rows of a table of categories that is added to the ids'; 0 leaves it out. Batches have to bring categories."""
    content_width: int = Field(default=64, ge=1)
    """Width that the stored vectors are projected to."""
    refresh_projection: bool = True
    """Whether that projection keeps learning; otherwise it stays what it was at the start."""
    hidden: tuple[int, ...] = (96, 48)
    """Widths of the prediction layers."""
    attention_hidden: int = Field(default=32, ge=1)
    """Width of the target-attention unit."""
    similarity_bins: int = Field(default=16, ge=1)
    """Tiers of the similarity histogram over [-1, 1]."""
    id_interest: bool = True
    """Target attention over the ids of the history."""
    content_interest: bool = True
    """Similarity-weighted sum of the history's content."""
    fusion_interest: bool = True
    """Similarity-weighted sum of the history's ids."""
    similarity_features: bool = True
    """Histogram and summaries of the similarities themselves."""
    raw_similarities: bool = True
    """Similarities of the stored vectors beside those of the projected ones."""
    bilinear_interest: bool = False
    """Summaries of a learned bilinear form of target and history content, beside their cosine."""
    target_id: bool = True
    """The target's own id embedding beside the interests."""
    target_content: bool = True
    """The target's own content beside the interests."""
    content_in_attention: bool = True
    """Let the target attention see the content similarity."""
    numeric_bins: int = Field(default=0, ge=0)
    """Bins per dense feature, at quantiles of the training rows; 0 takes the numbers as they are."""
    numeric_width: int = Field(default=8, ge=1)
    """Width of a binned feature's embedding."""
    cross_layers: int = Field(default=0, ge=0)
    """Layers of explicit feature crosses before the prediction layers, each head its own."""
    cross_rank: int = Field(default=32, ge=1)
    """Rank of their matrices."""
    heads: int = Field(default=1, ge=1)
    """Prediction networks over the same interests, each with crosses and layers of its own, averaged as
    probabilities."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of hidden units dropped in training."""
    recency_half_life_items: float = Field(default=8.0, gt=0)
    """After how many items a history item counts half in the recent similarity and the contrastive anchor."""

    @property
    def uses_content(self) -> bool:
        """Whether any part looks at vectors."""
        return any(
            (
                self.content_interest,
                self.fusion_interest,
                self.similarity_features,
                self.bilinear_interest,
                self.target_content,
                self.content_in_attention,
            )
        )

    @property
    def draws_in_training(self) -> bool:
        """Whether a training step draws random numbers."""
        return bool(self.dropout or self.id_dropout)

    def without_content(self) -> CiUBMConfig:
        """The same class as an id-only DIN."""
        return self.model_copy(
            update=dict.fromkeys(
                (
                    "content_interest",
                    "fusion_interest",
                    "similarity_features",
                    "bilinear_interest",
                    "target_content",
                    "content_in_attention",
                ),
                False,
            )
        )


class LearnerConfig(BaseModel):
    """How a CiUBM learns."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    learning_rate: float = Field(default=4e-3, gt=0)
    """Step size of the dense weights."""
    id_learning_rate: float = Field(default=1e-2, gt=0)
    """Step size of the id table: a row is touched rarely and has to move when it is."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay of the dense weights."""
    contrastive_weight: float = Field(default=0.1, ge=0)
    """Weight of the contrastive term; 0 switches it off."""
    temperature: float = Field(default=0.2, gt=0)
    """Temperature of the contrastive term."""
    log_q_strength: float = Field(default=0.5, ge=0, le=1)
    """How much of the sampling correction is applied: 1 takes popularity out of the content space entirely."""
    max_gradient_norm: float = Field(default=5.0, gt=0)
    """Dense gradients are scaled down to this norm."""


class TrainerConfig(BaseModel):
    """The sliding window, the negatives and the cadence of releases."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seed: int = 20250201
    """Seed of every random choice."""
    batch_rows: int = Field(default=256, ge=2)
    """Impressions per optimiser step."""
    history_length: int = Field(default=50, ge=1, le=1_000)
    """Most recent takes of a user that a row sees."""
    max_users: int = Field(default=1_000_000, ge=1)
    """Users whose history is kept; the one who was still for longest is forgotten first."""
    lateness_seconds: float = Field(default=60.0, ge=0)
    """How far an event may lie behind its partition's newest one and still count."""
    duplicate_horizon_seconds: float = Field(default=6 * 3600.0, ge=0)
    """How long an event_id is remembered, in event time."""
    attribution_seconds: float = Field(default=60.0, ge=0)
    """How long an impression waits for its take, in event time, before it counts as not taken."""
    correction_seconds: float = Field(default=3600.0, ge=0)
    """How long after that a late take still corrects it: the impression is learned from once more, as taken."""
    correction_rows: int = Field(default=10_000, ge=0)
    """The newest impressions learned as not taken that a late take can correct; 0 switches corrections off."""
    window_seconds: float = Field(default=6 * 3600.0, gt=0)
    """Length of the sliding window that space negatives come from, in event time."""
    window_takes: int = Field(default=1024, ge=1)
    """Most takes in that window."""
    bank_takes: int = Field(default=8192, ge=1)
    """Most takes in the bank that time negatives come from."""
    bank_seconds: float = Field(default=14 * 24 * 3600.0, gt=0)
    """Oldest take in the bank, in event time."""
    space_negatives: int = Field(default=128, ge=0)
    """Items drawn from the window for each step."""
    time_negatives: int = Field(default=128, ge=0)
    """Items drawn from the bank for each step."""
    popularity_half_life_seconds: float = Field(default=3 * 24 * 3600.0, gt=0)
    """Half-life of the take counts behind the logQ correction."""
    release_every_rows: int = Field(default=20_000, ge=1)
    """Rows learned between two releases."""
    release_every_event_seconds: float | None = Field(default=None, gt=0)
    """Event time between two releases, where that comes before `release_every_rows`."""
    max_pending: int = Field(default=200_000, ge=1)
    """Events held in memory above which the reader should pause."""
    model: CiUBMConfig = Field(default_factory=CiUBMConfig)
    """The network."""
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    """Optimisers and losses."""
