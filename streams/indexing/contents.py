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

    Where the picture is broken, refused or missing, in the event itself or behind its URL, the title is encoded.
    """
    picture = item.image or None  # a field that is there and empty is no picture
    if picture is not None or item.image_url is None:
        return await _with_title(context, item, price, await context.encoding.prepare(item, price, picture))
    try:
        async with context.fetch(item.image_url, timeout_seconds=context.config.fetch_budget_seconds) as picture:
            prepared = await context.encoding.prepare(item, price, picture)
    except ContentUnavailable:
        return ItemInputs(await _title(context, item, price), late=True)
    except Unprocessable as error:
        return ItemInputs(await _title(context, item, price), errors=(("image", error),))
    return await _with_title(context, item, price, prepared)


async def _with_title(
    context: IndexContext, item: ItemPublished, price: float | None, prepared: Prepared | EncodingFailed
) -> ItemInputs:
    """What was prepared; where it failed, the title alone."""
    if not isinstance(prepared, EncodingFailed):
        return ItemInputs(prepared)
    stage = stage_of(prepared)
    title = await _title(context, item, price) if stage == "image" else None
    return ItemInputs(title, errors=((stage, prepared),))


async def _title(context: IndexContext, item: ItemPublished, price: float | None) -> Prepared | None:
    """What the towers need of the item's texts; None if it has none, or none that can be encoded."""
    if not (item.title.strip() or item.text.strip()):
        return None
    prepared = await context.encoding.prepare(item, price, None)
    return None if isinstance(prepared, EncodingFailed) else prepared


def stage_of(error: EncodingFailed) -> str:
    """The stage that a failed preparation belongs to."""
    return "image" if error.reason in (Reason.BAD_IMAGE, Reason.IMAGE_TOO_LARGE) else "encode"
