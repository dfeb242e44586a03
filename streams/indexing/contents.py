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
    picture = await _picture(context, item)
    if isinstance(picture, ContentUnavailable):
        if not _has_text(item):
            return ItemInputs(None, late=True)
        prepared = await _prepare(context, item, price, None)
        if isinstance(prepared, EncodingFailed):
            return ItemInputs(None, late=True, errors=((stage_of(prepared), prepared),))
        return ItemInputs(prepared, late=True)
    if isinstance(picture, Unprocessable):
        return await _title_alone(context, item, price, "image", picture)
    prepared = await _prepare(context, item, price, picture)
    if not isinstance(prepared, EncodingFailed):
        return ItemInputs(prepared)
    if picture is not None and item.image is None:
        return await _title_alone(context, item, price, stage_of(prepared), prepared)
    return ItemInputs(None, errors=((stage_of(prepared), prepared),))


def stage_of(error: EncodingFailed) -> str:
    """The stage that a failed preparation belongs to."""
    return "image" if error.reason in (Reason.BAD_IMAGE, Reason.IMAGE_TOO_LARGE) else "encode"


async def _title_alone(
    context: IndexContext, item: ItemPublished, price: float | None, stage: str, error: Unprocessable
) -> ItemInputs:
    errors = ((stage, error),)
    prepared = await _prepare(context, item, price, None) if _has_text(item) else None
    return ItemInputs(prepared if isinstance(prepared, Prepared) else None, errors=errors)


async def _picture(context: IndexContext, item: ItemPublished) -> bytes | Unprocessable | ContentUnavailable | None:
    if item.image is not None or item.image_url is None:
        return item.image
    try:
        return await context.fetch(item.image_url, timeout_seconds=context.config.fetch_budget_seconds)
    except (Unprocessable, ContentUnavailable) as error:
        return error


async def _prepare(
    context: IndexContext, item: ItemPublished, price: float | None, picture: bytes | None
) -> Prepared | EncodingFailed:
    (prepared,) = await context.encoding.prepare([(item, price, picture)])
    return prepared


def _has_text(item: ItemPublished) -> bool:
    return bool(item.title.strip() or item.text.strip())
