"""The content of an item to encode: its text, its picture, and the errors of either."""

from __future__ import annotations

from dataclasses import dataclass

from encoders.base import Prepared
from schemas.errors import ContentUnavailable, EncodingFailed, Reason, Unprocessable
from schemas.items import ItemPublished
from streams.indexing.context import IndexContext


@dataclass(frozen=True)
class ItemInputs:
    """An item as the towers will see it."""

    prepared: Prepared | None
    """None: there is nothing to encode, now (`late`) or ever (`errors`)."""
    late: bool = False
    """Whether its picture is not available yet."""
    errors: tuple[tuple[str, Unprocessable], ...] = ()
    """Why parts of it cannot be used, each with the stage of its dead letter."""


async def load_content(context: IndexContext, item: ItemPublished, price: float | None) -> ItemInputs:
    """Fetch the picture and prepare what the towers need.

    What an event carries itself must be whole, else there is nothing to encode. Where only what its URL leads to is
    broken or missing, the title is encoded and stays.
    """
    picture, late = item.image, False
    errors: list[tuple[str, Unprocessable]] = []
    has_text = bool(item.title.strip() or item.text.strip())
    if picture is None and item.image_url is not None:
        try:
            picture = await context.fetch(item.image_url, timeout_seconds=context.config.fetch_budget_seconds)
        except ContentUnavailable:
            late = True
        except Unprocessable as error:
            errors.append(("image", error))
        if picture is None and not has_text:
            return ItemInputs(None, late, tuple(errors))
    prepared = await context.encoding.prepare(item, price, picture)
    if isinstance(prepared, EncodingFailed) and not errors:
        errors.append((stage_of(prepared), prepared))
        if picture is not None and item.image is None and has_text:
            prepared = await context.encoding.prepare(item, price, None)
    return ItemInputs(None if isinstance(prepared, EncodingFailed) else prepared, late, tuple(errors))


def stage_of(error: EncodingFailed) -> str:
    """The stage that a failed preparation belongs to."""
    return "image" if error.reason in (Reason.BAD_IMAGE, Reason.IMAGE_TOO_LARGE) else "encode"
