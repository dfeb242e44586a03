"""Settings of `mimstream record`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from schemas.behaviours import Behaviour
from schemas.field_maps import FieldMap, checked_field_map


class RecordConfig(BaseModel):
    """How `mimstream record` reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_records: int = Field(default=2_000, ge=1)
    """Records taken from the broker's answers at a time, over all partitions."""
    session_timeout_ms: int = Field(default=10_000, ge=1_000)
    """How long a killed recorder keeps its partitions."""
    identity_check_seconds: float = Field(default=30.0, gt=0)
    """How often to look whether the topic is still the same one."""
    deleted_gather_seconds: float = Field(default=30.0, ge=0)
    """Shortest time between two sweeps for newly deleted items. A sweep looks at every user once, removes what was
    taken of those items, and takes a fifth of the Redis server at most."""
    deleted_sweep_seconds: float = Field(default=900.0, gt=0)
    """How often to sweep again without a new deletion: what is recorded of an item after it was deleted goes then."""
    field_map: Annotated[FieldMap, AfterValidator(partial(checked_field_map, model=Behaviour))] = Field(
        default_factory=dict
    )
    """Where a platform's records of behaviours hold our fields: `{"item_id": "sku"}`. See deploy/field-maps.md."""
