"""Webhooks of the project: who is told when a batch finished, how often that succeeded, and with which signature."""

from datetime import timedelta
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from api.bodies import JsonBytes, read
from api.deps import ConnDep, ManagerDep, ReaderDep, SettingsDep
from api.examples import WEBHOOK
from api.openapi import body as documented
from api.schemas import Overlap, Paging, WebhookBody, WebhookChange
from farm import webhooks
from farm.views import Page
from farm.views_tenants import DeliveryView, WebhookView

router = APIRouter(prefix="/webhooks", tags=["webhooks"])


@router.post("", status_code=201, openapi_extra=documented(WebhookBody, {"finished batches": WEBHOOK}))
def create_webhook(caller: ManagerDep, body: JsonBytes, settings: SettingsDep, conn: ConnDep) -> WebhookView:
    """Have an address told of events. The secret that proves it was us is in this answer and nowhere else."""
    wanted = read(body, WebhookBody)
    return webhooks.create(
        conn,
        caller.project_id,
        url=wanted.url,
        events=wanted.events,
        failed_share=wanted.failed_share,
        settings=settings,
    )


@router.get("")
def list_webhooks(caller: ReaderDep, conn: ConnDep) -> Page[WebhookView]:
    """The project's webhooks, oldest first, without secrets."""
    return Page(items=webhooks.every(conn, caller.project_id))


@router.get("/{webhook_id}")
def get_webhook(webhook_id: UUID, caller: ReaderDep, conn: ConnDep) -> WebhookView:
    """One webhook."""
    return webhooks.get(conn, caller.project_id, webhook_id)


@router.patch("/{webhook_id}", openapi_extra=documented(WebhookChange, {"switch it off": {"enabled": False}}))
def change_webhook(
    webhook_id: UUID, caller: ManagerDep, body: JsonBytes, settings: SettingsDep, conn: ConnDep
) -> WebhookView:
    """Change its address or events, or switch it off or on. Switched off, it forgets what was still to be told."""
    wanted = read(body, WebhookChange)
    return webhooks.change(conn, caller.project_id, webhook_id, **wanted.model_dump(), settings=settings)


@router.delete("/{webhook_id}", status_code=204)
def delete_webhook(webhook_id: UUID, caller: ManagerDep, conn: ConnDep) -> None:
    """Remove a webhook with its deliveries."""
    webhooks.delete(conn, caller.project_id, webhook_id)


@router.post("/{webhook_id}/rotate")
def rotate_webhook_secret(
    webhook_id: UUID, caller: ManagerDep, conn: ConnDep, wanted: Annotated[Overlap, Query()]
) -> WebhookView:
    """Make a new secret, shown in this answer only. For a while messages carry a signature by each of the two."""
    return webhooks.rotate(conn, caller.project_id, webhook_id, timedelta(seconds=wanted.overlap))


@router.post("/{webhook_id}/ping", status_code=202)
def ping_webhook(webhook_id: UUID, caller: ManagerDep, conn: ConnDep) -> DeliveryView:
    """Send a `webhook.ping`; whether it arrived is told by its delivery, a moment later."""
    return webhooks.ping(conn, caller.project_id, webhook_id)


@router.get("/{webhook_id}/deliveries")
def list_webhook_deliveries(
    webhook_id: UUID, caller: ReaderDep, conn: ConnDep, wanted: Annotated[Paging, Query()]
) -> Page[DeliveryView]:
    """What it was told or will be, newest first, with the last answer and the next try."""
    return webhooks.deliveries(conn, caller.project_id, webhook_id, cursor=wanted.cursor, limit=wanted.limit)
