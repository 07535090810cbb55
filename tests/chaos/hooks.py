"""What a project's webhook heard of a run, against what it should have heard."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, text
from standardwebhooks import Webhook, WebhookVerificationError

from farm.webhooks import message_id
from tests.chaos.invariants import Violation
from tests.chaos.secrets import named_in
from tests.farm.receivers import Received

_TOLD = text("SELECT id, batch_id, delivered_at, last_error FROM webhook_deliveries")
_UNTOLD = text("""
    SELECT id FROM batches b WHERE NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.batch_id = b.id) LIMIT 20
""")
# What is not added up yet may tell of a batch that ended for the second time, after a retry.
_OPEN = text("""
    SELECT EXISTS (SELECT FROM webhook_deliveries WHERE delivered_at IS NULL)
        OR EXISTS (SELECT FROM batches b WHERE NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.batch_id = b.id))
        OR EXISTS (SELECT FROM counter_deltas)
""")


class Inspector:
    """Verifies every message when it arrives: a signature holds for five minutes, and a run may last for hours."""

    def __init__(self, secret: str) -> None:
        self._webhook = Webhook(secret)
        self.wrong: list[str] = []

    def look(self, one: Received) -> None:
        try:
            self._webhook.verify(one.body, one.headers)
        except WebhookVerificationError as error:
            self.wrong.append(f"message {one.headers['webhook-id']} does not verify: {error}")


def all_told(conn: Connection) -> bool:
    """Whether every batch has a message, and every message arrived. To be asked when all batches have ended."""
    return not conn.scalar(_OPEN)


def check(conn: Connection, inspector: Inspector, heard: Sequence[Received]) -> list[Violation]:
    """I6 of webhooks: every batch's end was told, at least once, always under the same id and with the same words."""
    found = [Violation("I6", f"the end of batch {row.id} was never told") for row in conn.execute(_UNTOLD)]
    found += [Violation("I6", wrong) for wrong in inspector.wrong]
    bodies: dict[str, set[bytes]] = {}
    for one in heard:
        bodies.setdefault(one.headers["webhook-id"], set()).add(hashlib.sha256(one.body).digest())
    told: dict[str, Any] = {message_id(row.id): row for row in conn.execute(_TOLD)}
    for name, row in told.items():
        if row.delivered_at is None or name not in bodies:
            found.append(Violation("I6", f"message {name} of batch {row.batch_id} did not arrive: {row.last_error}"))
    found += [Violation("I6", f"message {name} arrived and nobody sent it") for name in bodies.keys() - told.keys()]
    found += [Violation("I6", f"message {name} came in other words") for name, said in bodies.items() if len(said) > 1]
    return found


def leaks(heard: Sequence[Received], secrets: Mapping[str, str]) -> list[Violation]:
    """Secrets that a webhook's receiver was told. Its signature is made with one, and holds none."""
    found = set()
    for one in heard:
        headers = [f"{name}: {value}" for name, value in one.headers.items() if name != "webhook-signature"]
        found |= set(named_in("\n".join([one.path, *headers]).encode() + one.body, secrets))
    return [Violation("secret", f"{name} was told to a webhook") for name in sorted(found)]
