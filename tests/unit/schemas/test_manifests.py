"""Names of releases, and which of two trainers is the later one."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import pytest
from pydantic import TypeAdapter, ValidationError

from schemas.base import EncoderVersion
from schemas.manifests import Fence, ModelManifest, running_number

HEAD = "0123456789ab"
MANIFEST = {
    "weights_sha256": "x",
    "encoder_version": "mm128-0",
    "dim": 8,
    "created_at": datetime(2026, 1, 1, tzinfo=UTC),
    "rows_trained": 0,
    "steps": 0,
    "rows_sha256": "x",
    "offsets": {},
}


@pytest.mark.parametrize(
    ("digits", "number"),
    [("000007", 7), ("999999", 999_999), ("1000000", 1_000_000), ("9" * 18, 10**18 - 1)],
)
def test_a_release_is_numbered_by_six_digits_or_as_many_as_it_needs(digits: str, number: int) -> None:
    name = f"r{digits}-{HEAD}"
    assert ModelManifest(release_id=name, **MANIFEST).release_id == name  # type: ignore[arg-type]
    assert running_number(name) == number


@pytest.mark.parametrize(
    "name",
    [
        f"r00007-{HEAD}", f"r0000007-{HEAD}", f"r{'9' * 19}-{HEAD}", f"s000007-{HEAD}", f"r000007-{HEAD}0",
        f"r000007-{HEAD[1:]}", f"r000007-{HEAD[1:]}A", f"r000007-{HEAD}/..", f"xr000007-{HEAD}", "r000007",
    ],
)  # fmt: skip
def test_any_other_name_of_a_release_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="release_id"):
        ModelManifest(release_id=name, **MANIFEST)  # type: ignore[arg-type]


def test_terms_decide_first_then_producers_then_their_epochs() -> None:
    fences = [Fence(term=t, producer_id=p, epoch=e) for t, p, e in itertools.product((0, 1), (3, 20), (1, 10))]
    orders = [fence.order for fence in fences]
    assert orders == sorted(set(orders))
    assert Fence(producer_id=3, epoch=1).order == orders[0]


@pytest.mark.parametrize(
    ("version", "fits"),
    [("a", True), ("0.9_x-Y".lower(), True), ("x" * 64, True), ("x" * 65, False), ("", False), ("-a", False),
     (".a", False), ("A", False), ("aB", False), ("a:b", False), ("a/b", False), ("a b", False), ("a\n", False)],
)  # fmt: skip
def test_a_version_is_a_short_name_in_lower_case_without_colon(version: str, fits: bool) -> None:
    try:
        assert TypeAdapter(EncoderVersion).validate_python(version) == version
        assert fits
    except ValidationError:
        assert not fits
