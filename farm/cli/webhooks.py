"""`farm webhooks`: who is told when a batch finished or a job failed."""

from typing import Annotated

import typer

from farm.cli.display import ago, json_line, table
from farm.cli.options import DATA_DIR, AsJson, DataDir, connect
from farm.cli.saying import say
from farm.views_tenants import WebhookView

webhooks = typer.Typer(help="Addresses that are told what happens.", no_args_is_help=True)

Which = Annotated[str, typer.Argument(help="The webhook's id, as `farm webhooks list` shows it.", metavar="ID")]
Events = Annotated[
    list[str] | None,
    typer.Option("--event", help="batch.finished, batch.failed_share, batch.stopped or job.failed; may be repeated."),
]
Share = Annotated[
    float | None, typer.Option(help="Share of a batch's jobs, above 0 and at most 1.", show_default=False)
]


@webhooks.command()
def create(
    url: Annotated[str, typer.Argument(help="Where to POST, https://...")],
    event: Events = None,
    failed_share: Share = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Add a webhook for all events unless told which, and print its secret. It is shown this once."""
    with connect(data_dir) as farm:
        _show_secret(farm.webhooks.create(url, event, failed_share=failed_share), as_json=as_json)


@webhooks.command("list")
def list_webhooks(data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """List webhooks."""
    with connect(data_dir) as farm:
        found = farm.webhooks.list()
    if as_json:
        for webhook in found:
            json_line(webhook)
        return
    table(
        ("ID", "URL", "EVENTS", "CREATED", "STATE"),
        (
            (
                webhook.id,
                webhook.url,
                ", ".join(webhook.events),
                ago(webhook.created_at),
                "on" if webhook.enabled else f"off: {webhook.disabled_reason}",
            )
            for webhook in found
        ),
        "There are no webhooks.",
    )


@webhooks.command()
def change(
    webhook: Which,
    url: Annotated[str | None, typer.Option(help="Another address.", show_default=False)] = None,
    event: Events = None,
    failed_share: Share = None,
    enabled: Annotated[
        bool | None, typer.Option("--on/--off", help="Tell it, or forget what was still to be told.")
    ] = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Change a webhook, switch it off or on again."""
    with connect(data_dir) as farm:
        changed = farm.webhooks.change(webhook, url=url, events=event, failed_share=failed_share, enabled=enabled)
    if as_json:
        json_line(changed)
    else:
        say(f"{changed.id} is {'on' if changed.enabled else 'off'}: {', '.join(changed.events)} to {changed.url}")


@webhooks.command()
def rotate(
    webhook: Which,
    overlap: Annotated[int | None, typer.Option(help="Seconds that the old secret stays valid; a day.")] = None,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a new secret and print it. For a while messages are signed with both."""
    with connect(data_dir) as farm:
        _show_secret(farm.webhooks.rotate(webhook, overlap), as_json=as_json)


@webhooks.command()
def ping(webhook: Which, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Send a test message; `farm webhooks deliveries` tells whether it arrived."""
    with connect(data_dir) as farm:
        sent = farm.webhooks.ping(webhook)
    if as_json:
        json_line(sent)
    else:
        say(f"{sent.message_id} is on its way")


@webhooks.command()
def deliveries(
    webhook: Which,
    limit: Annotated[int, typer.Option(help="Most to show.", min=1, max=500)] = 50,
    data_dir: DataDir = DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """What a webhook was told, newest first."""
    with connect(data_dir) as farm:
        found = farm.webhooks.deliveries(webhook, limit)
    if as_json:
        for delivery in found:
            json_line(delivery)
        return
    table(
        ("MESSAGE", "EVENT", "CREATED", "STATE", "#TRIES", "LAST ANSWER"),
        (
            (
                delivery.message_id,
                delivery.event,
                ago(delivery.created_at),
                delivery.state,
                delivery.attempts,
                delivery.last_error or delivery.last_status,
            )
            for delivery in found
        ),
        "Nothing was told yet.",
    )


@webhooks.command()
def delete(webhook: Which, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Remove a webhook with its deliveries."""
    with connect(data_dir) as farm:
        farm.webhooks.delete(webhook)
    if as_json:
        json_line({"id": webhook, "deleted": True})
    else:
        say(f"{webhook} deleted")


def _show_secret(made: WebhookView, *, as_json: bool) -> None:
    if as_json:
        json_line(made)
    else:
        say(made.secret)
        say(f"Webhook {made.id} to {made.url}. Keep its secret; it is not shown again.", err=True)
