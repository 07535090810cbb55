"""Webhooks over the API: `farm.webhooks.create("https://...")`, blocking or awaited."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson

from farm.client.calls import API, JSON, Call, Id, items, nothing, segment, view
from farm.views_tenants import DeliveryView, WebhookView

PATH = f"{API}/webhooks"
WEBHOOK: Callable[[bytes], WebhookView] = view(WebhookView)


def create(url: str, events: Sequence[str] | None, failed_share: float | None) -> Call[WebhookView]:
    """Not repeatable: each answer is another webhook."""
    body = _given(url=url, events=None if events is None else list(events), failed_share=failed_share)
    return Call("POST", PATH, WEBHOOK, body=body, headers=JSON, repeatable=False)


def change(webhook: Id, **wanted: Any) -> Call[WebhookView]:
    return Call("PATCH", f"{PATH}/{segment(webhook)}", WEBHOOK, body=_given(**wanted), headers=JSON)


def rotate(webhook: Id, overlap: int | None) -> Call[WebhookView]:
    """Not repeatable: a second one would end the overlap of the first."""
    params = [] if overlap is None else [("overlap", str(overlap))]
    return Call("POST", f"{PATH}/{segment(webhook)}/rotate", WEBHOOK, params, repeatable=False)


def ping(webhook: Id) -> Call[DeliveryView]:
    return Call("POST", f"{PATH}/{segment(webhook)}/ping", view(DeliveryView), repeatable=False)


def deliveries(webhook: Id, limit: int) -> Call[list[DeliveryView]]:
    return Call("GET", f"{PATH}/{segment(webhook)}/deliveries", items(DeliveryView), [("limit", str(limit))])


def every() -> Call[list[WebhookView]]:
    return Call("GET", PATH, items(WebhookView))


def delete(webhook: Id) -> Call[None]:
    return Call("DELETE", f"{PATH}/{segment(webhook)}", nothing)


def _given(**fields: Any) -> bytes:
    return orjson.dumps({name: value for name, value in fields.items() if value is not None})


class Webhooks:
    """The project's webhooks, of the blocking client."""

    def __init__(self, send: Callable[[Call[Any]], Any]) -> None:
        self._send = send

    def create(
        self, url: str, events: Sequence[str] | None = None, *, failed_share: float | None = None
    ) -> WebhookView:
        """Have an address told. The answer's `secret` is shown this once."""
        made: WebhookView = self._send(create(url, events, failed_share))
        return made

    def list(self) -> Sequence[WebhookView]:
        found: Sequence[WebhookView] = self._send(every())
        return found

    def change(self, webhook: Id, **wanted: Any) -> WebhookView:
        """Change `url`, `events`, `failed_share` or `enabled`."""
        changed: WebhookView = self._send(change(webhook, **wanted))
        return changed

    def rotate(self, webhook: Id, overlap: int | None = None) -> WebhookView:
        """A new `secret`; the one before stays valid for `overlap` seconds, a day unless given."""
        turned: WebhookView = self._send(rotate(webhook, overlap))
        return turned

    def ping(self, webhook: Id) -> DeliveryView:
        sent: DeliveryView = self._send(ping(webhook))
        return sent

    def deliveries(self, webhook: Id, limit: int = 50) -> Sequence[DeliveryView]:
        """What it was told, newest first."""
        found: Sequence[DeliveryView] = self._send(deliveries(webhook, limit))
        return found

    def delete(self, webhook: Id) -> None:
        self._send(delete(webhook))


class AsyncWebhooks:
    """The same, of the asynchronous client."""

    def __init__(self, send: Callable[[Call[Any]], Awaitable[Any]]) -> None:
        self._send = send

    async def create(
        self, url: str, events: Sequence[str] | None = None, *, failed_share: float | None = None
    ) -> WebhookView:
        made: WebhookView = await self._send(create(url, events, failed_share))
        return made

    async def list(self) -> Sequence[WebhookView]:
        found: Sequence[WebhookView] = await self._send(every())
        return found

    async def change(self, webhook: Id, **wanted: Any) -> WebhookView:
        changed: WebhookView = await self._send(change(webhook, **wanted))
        return changed

    async def rotate(self, webhook: Id, overlap: int | None = None) -> WebhookView:
        turned: WebhookView = await self._send(rotate(webhook, overlap))
        return turned

    async def ping(self, webhook: Id) -> DeliveryView:
        sent: DeliveryView = await self._send(ping(webhook))
        return sent

    async def deliveries(self, webhook: Id, limit: int = 50) -> Sequence[DeliveryView]:
        found: Sequence[DeliveryView] = await self._send(deliveries(webhook, limit))
        return found

    async def delete(self, webhook: Id) -> None:
        await self._send(delete(webhook))
