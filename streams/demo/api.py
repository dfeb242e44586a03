"""A client of `mimstream serve`, for the requests of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import aiohttp
from yarl import URL

from schemas.base import Message
from schemas.errors import StoreUnavailable
from schemas.scoring import ItemView, ScoreResponse, SimilarResponse, SimilarResult

M = TypeVar("M", bound=Message)


class ServeApi:
    """Calls of the HTTP API, answers validated by the schemas."""

    def __init__(self, base_url: str, *, timeout_seconds: float = 30.0) -> None:
        self._base_url = base_url
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(self._base_url, timeout=self._timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def ready(self) -> bool:
        """Whether it can score now."""
        assert self._session is not None
        try:
            async with self._session.get("/readyz") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def score(
        self, user_id: str, item_ids: Sequence[str], *, at: int | None = None, query_text: str | None = None
    ) -> ScoreResponse:
        """`POST /v1/score`, as of a second since 1970. Raises `StoreUnavailable` unless it answers as it should."""
        asked = {"user_id": user_id, "item_ids": list(item_ids), "at": at, "query_text": query_text}
        given: dict[str, object] = {name: value for name, value in asked.items() if value is not None}
        return await self._post("/v1/score", given, ScoreResponse)

    async def similar(self, item_ids: Sequence[str], *, k: int, include_self: bool) -> list[SimilarResult]:
        """`POST /v1/similar` for several items."""
        body = {"item_ids": list(item_ids), "k": k, "include_self": include_self}
        return (await self._post("/v1/similar", body, SimilarResponse)).results

    async def holds(self, item_id: str) -> bool:
        """Whether the center holds the item."""
        return await self._get_item(item_id, vector=False) is not None

    async def item(self, item_id: str) -> ItemView | None:
        """`GET /v1/items/{id}` with its vector; None if the center does not hold it."""
        return await self._get_item(item_id, vector=True)

    async def _get_item(self, item_id: str, *, vector: bool) -> ItemView | None:
        path = f"/v1/items/{quote(item_id, safe='')}"
        status, payload = await self._request("GET", path, params={"vector": "1"} if vector else {})
        return None if status == 404 else ItemView.model_validate_json(payload)

    async def _post(self, path: str, body: dict[str, object], model: type[M]) -> M:
        return model.model_validate_json((await self._request("POST", path, json=body))[1])

    async def _request(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        """Status and body; a GET may find nothing (404)."""
        assert self._session is not None
        try:
            async with self._session.request(method, URL(path, encoded=True), **options) as answer:
                payload = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StoreUnavailable("mimstream serve", f"{path}: {error!r}") from error
        if answer.status != 200 and (method, answer.status) != ("GET", 404):
            raise StoreUnavailable("mimstream serve", f"{path}: {answer.status} {payload[:300]!r}")
        return answer.status, payload
