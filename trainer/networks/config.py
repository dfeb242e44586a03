"""Settings of the click network and of its learner."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class TreesConfig(BaseModel):
    """Boosted trees beside the network."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    count: int = Field(default=100, ge=0)
    """Most trees; 0 leaves them out."""
    depth: int = Field(default=5, ge=1, le=10)
    """Most levels of a tree."""
    leaves: int = Field(default=16, ge=2)
    """Most leaves of a tree, and never more than 2 to the power of its depth."""
    leaf_rows: int = Field(default=200, ge=1)
    """Least rows in a leaf."""
    learning_rate: float = Field(default=0.1, gt=0, le=1)
    """Share of each tree's correction that is applied."""
    rows: int = Field(default=200_000, ge=2)
    """The newest rows learned from that trees are fitted on; about 220 bytes each."""
    first_rows: int = Field(default=20_000, ge=2)
    """Rows before the first fit. The next one comes after twice as many rows as the one before had."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Most that the trees' logit weighs beside the network's. A stream weighs it by what served the last rows best."""

    @model_validator(mode="after")
    def _window_holds_the_first_fit(self) -> Self:
        if self.first_rows > self.rows:
            raise ValueError(f"first_rows is {self.first_rows}, more than the {self.rows} rows that are kept: lower it")
        return self


class CiUBMConfig(BaseModel):
    """Size and parts of the model. Every interest can be switched off, so that an ablation is a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id_width: int = Field(default=16, ge=1)
    """Width of an item-id embedding."""
    id_rows: int = Field(default=1 << 15, ge=8, multiple_of=8)
    """Most ids with an embedding of their own; in a full table the longest unseen lose theirs."""
    id_admit_after: int = Field(default=2, ge=1)
    """In how many batches an id has to occur before it gets an embedding of its own; until then it reads the one that
    all new ids share."""
    id_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a batch's items that are treated as new ids in training (as in DropoutNet), so that the model works
    without ids and does not overfit to them."""
    categories: int = Field(default=1024, ge=0)
    """Rows of a table of hashed categories that is added to the ids'; 0 leaves it out."""
    content_width: int = Field(default=64, ge=1)
    """Width to which the stored vectors are projected."""
    refresh_projection: bool = True
    """Whether that projection is trained; otherwise it keeps its initial weights."""
    hidden: tuple[int, ...] = (96, 48)
    """Widths of the prediction layers."""
    attention_hidden: int = Field(default=32, ge=1)
    """Width of the target-attention unit."""
    similarity_bins: int = Field(default=16, ge=1)
    """Tiers of the similarity histogram over [-1, 1]."""
    id_interest: bool = True
    """Target attention over the ids of the history."""
    content_interest: bool = True
    """The same attention's sum of the history's content."""
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
    """Let the target attention see the content similarities."""
    numeric_width: int = Field(default=8, ge=0)
    """Width of the embedding of each numeric feature, which is linear between fixed knots; 0 uses the plain numbers."""
    cross_layers: int = Field(default=2, ge=0)
    """Layers of explicit feature crosses before the prediction layers."""
    cross_rank: int = Field(default=32, ge=1)
    """Rank of their matrices."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of hidden units dropped in training."""
    kinds: tuple[Literal["cart", "purchase"], ...] = ()
    """Further outputs, in this order: the probability that an impression is put into the cart (or bought), and that it
    is bought. A purchase counts as a cart, and both as a take. Without any there is one output, whether it is taken."""
    recency_half_life_items: float = Field(default=8.0, gt=0)
    """Age in items at which a history item counts half in the recent similarity and the contrastive anchor."""
    trees: TreesConfig = Field(default_factory=TreesConfig)
    """Boosted trees beside the network."""

    @field_validator("kinds")
    @classmethod
    def _kinds_rise(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if list(kinds) not in ([], ["cart"], ["purchase"], ["cart", "purchase"]):
            raise ValueError("name cart, purchase, or both in this order, each once")
        return kinds

    @property
    def attends(self) -> bool:
        """Whether there is target attention: over the ids where they are an interest, else over the content."""
        return self.id_interest or self.content_interest

    @property
    def uses_content(self) -> bool:
        """Whether any part reads vectors."""
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
        """The id-only variant, a DIN."""
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
    """How a CiUBM is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    learning_rate: float = Field(default=4e-3, gt=0)
    """Step size of the dense weights."""
    id_learning_rate: float = Field(default=1e-2, gt=0)
    """Step size of the id table, larger because a row has few steps."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay of the dense weights."""
    contrastive: bool = True
    """Whether what users take next shapes a space of content interest, against space-time negatives, beside the click
    loss; it changes no score."""
    temperature: float = Field(default=0.2, gt=0)
    """Temperature of the contrastive term."""
    log_q_strength: float = Field(default=0.5, ge=0, le=1)
    """Share of the sampling correction that is applied: 1 removes popularity from the content space entirely."""
    average_steps: float = Field(default=50.0, ge=0)
    """Half-life, in steps, of the running average of the dense weights that releases are made of (Polyak averaging); 0
    releases the weights of the last step."""
    value_weight: float = Field(default=0.0, ge=0, le=1)
    """How much takes count by what they are worth (`price` times `qty` of behaviours), in the last of the outputs
    MIM_TRAINER__MODEL__KINDS, or in the only one: by (value / usual value) to the power of this, from .1 to 10. Above 0
    that output ranks by value, and is no probability any more."""
    max_gradient_norm: float = Field(default=5.0, gt=0)
    """Dense gradients are scaled down to this norm."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_retired(cls, values: Any) -> Any:
        if isinstance(values, dict) and "contrastive_weight" in values:
            raise ValueError(
                "MIM_TRAINER__LEARNER__CONTRASTIVE_WEIGHT is gone: the contrastive term has a space of its own and no "
                "weight beside the click loss; MIM_TRAINER__LEARNER__CONTRASTIVE=false switches it off"
            )
        return values
