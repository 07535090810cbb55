"""Webhooks from the row to the receiver: told with what happened, signed, tried again, and none delays another."""

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import text
from standardwebhooks import Webhook, WebhookVerificationError

from farm import courier, webhooks
from farm.courier import PAUSES, Courier, pause
from farm.errors import Conflict, InvalidRequest, NotFound
from farm.maintenance import Sweeper
from farm.states import Outcome
from tests.farm.conftest import Queue
from tests.farm.hooks import add, carry, due_now, fold, neighbour, render, settings, told
from tests.farm.receivers import Receiver, receiving

__all__ = ["settings"]


@pytest.fixture
def carrier(queue: Queue) -> Iterator[Courier]:
    opened = Courier(queue.settings)
    yield opened
    opened.close()


def bodies(receiver: Receiver) -> list[str]:
    return [received.headers["webhook-id"] for received in receiver.seen]


def test_a_finished_batch_is_told_and_the_signature_verifies(queue: Queue, carrier: Courier) -> None:
    with receiving() as receiver:
        made = add(queue, receiver.url, "batch.finished")
        assert made.secret is not None
        batch = queue.submit(3)
        render(queue, limit=2)
        fold(queue)
        assert told(queue, made) == []
        render(queue)
        fold(queue)
        carry(carrier)
        (received,) = receiver.seen
        document = Webhook(made.secret).verify(received.body, received.headers)
        assert document["type"] == "batch.finished"
        assert document["data"]["id"] == str(batch.id)
        assert document["data"]["counts"]["succeeded"] == document["data"]["total"] == 3
        with pytest.raises(WebhookVerificationError):
            Webhook(webhooks.new_secret()).verify(received.body, received.headers)
        (delivery,) = told(queue, made)
        assert (delivery.state, delivery.attempts, delivery.last_status) == ("delivered", 1, 204)
        assert delivery.message_id == received.headers["webhook-id"]
        fold(queue)
        carry(carrier)
        assert len(receiver.seen) == 1


def test_what_is_not_taken_is_tried_again_under_the_same_id(queue: Queue, carrier: Courier) -> None:
    with receiving(lambda number: (500, 404, 200)[number - 1]) as receiver:
        made = add(queue, receiver.url)
        assert made.secret is not None
        queue.do(webhooks.ping, queue.project, made.id)
        before = time.time()
        for attempt in (1, 2):
            carry(carrier)
            (waiting,) = told(queue, made)
            assert (waiting.state, waiting.attempts) == ("waiting", attempt)
            assert waiting.last_error == f"answered {(500, 404)[attempt - 1]}"
            assert waiting.next_at is not None
            expected = PAUSES[attempt - 1].total_seconds()
            assert 0.85 * expected < waiting.next_at.timestamp() - before < 1.15 * expected + 10
            carry(carrier)
            assert len(receiver.seen) == attempt
            due_now(queue)
        carry(carrier)
        (delivery,) = told(queue, made)
        assert (delivery.state, delivery.attempts) == ("delivered", 3)
        assert len(set(bodies(receiver))) == 1
        assert len({received.body for received in receiver.seen}) == 1
        for received in receiver.seen:
            Webhook(made.secret).verify(received.body, received.headers)


def test_after_three_days_it_is_given_up(queue: Queue, carrier: Courier) -> None:
    assert timedelta(hours=70) < sum(PAUSES, timedelta()) < timedelta(hours=76)
    drawn = {pause(3, lambda value=value: value) for value in (0.0, 0.3, 1.0)}  # type: ignore[misc]
    assert len(drawn) == 3
    assert all(abs(found / PAUSES[2] - 1) <= 0.1001 for found in drawn if found)
    with receiving(lambda _: 500) as receiver:
        made = add(queue, receiver.url)
        queue.do(webhooks.ping, queue.project, made.id)
        for _ in range(len(PAUSES) + 3):
            carry(carrier)
            due_now(queue)
        (delivery,) = told(queue, made)
        assert (delivery.state, delivery.attempts, delivery.last_error) == ("failed", len(PAUSES) + 1, "answered 500")
        assert len(receiver.seen) == len(PAUSES) + 1


def test_410_switches_off_and_drops_what_waits(queue: Queue, carrier: Courier) -> None:
    with receiving(lambda _: 410) as receiver:
        made = add(queue, receiver.url)
        queue.do(webhooks.ping, queue.project, made.id)
        carry(carrier)
        found = queue.do(webhooks.get, queue.project, made.id)
        assert (found.enabled, found.disabled_reason) == (False, "it answered 410")
        with pytest.raises(Conflict, match="switched off"):
            queue.do(webhooks.ping, queue.project, made.id)
        queue.submit(1)
        render(queue, Outcome.FAILED)
        fold(queue)
        (delivery,) = told(queue, made)
        assert (delivery.state, delivery.last_status) == ("failed", 410)
        again = queue.do(webhooks.change, queue.project, made.id, enabled=True, settings=queue.settings)
        assert (again.enabled, again.disabled_reason) == (True, None)
        queue.do(webhooks.ping, queue.project, made.id)
        queue.do(webhooks.change, queue.project, made.id, enabled=False, settings=queue.settings)
        assert told(queue, made)[-1].state == "failed"
        carry(carrier)
        assert len(receiver.seen) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_failures_and_lead_nowhere(queue: Queue, carrier: Courier, status: int) -> None:
    with receiving() as elsewhere, receiving(lambda _: status, location=elsewhere.url) as receiver:
        made = add(queue, receiver.url)
        queue.do(webhooks.ping, queue.project, made.id)
        carry(carrier)
        (delivery,) = told(queue, made)
        assert delivery.state == "waiting"
        assert "redirects are not followed" in (delivery.last_error or "")
        assert elsewhere.seen == []


def test_for_a_while_both_secrets_sign(queue: Queue, carrier: Courier) -> None:
    with receiving() as receiver:
        made = add(queue, receiver.url)
        turned = queue.do(webhooks.rotate, queue.project, made.id)
        assert made.secret
        assert turned.secret
        assert made.secret != turned.secret
        queue.do(webhooks.ping, queue.project, made.id)
        carry(carrier)
        received = receiver.seen[0]
        for secret in (made.secret, turned.secret):
            Webhook(secret).verify(received.body, received.headers)
        last = queue.do(webhooks.rotate, queue.project, made.id, timedelta(0))
        assert last.secret is not None
        queue.do(webhooks.ping, queue.project, made.id)
        carry(carrier)
        received = receiver.seen[1]
        Webhook(last.secret).verify(received.body, received.headers)
        for secret in (made.secret, turned.secret):
            with pytest.raises(WebhookVerificationError):
                Webhook(secret).verify(received.body, received.headers)


def test_a_slow_receiver_delays_no_other(queue: Queue, carrier: Courier) -> None:
    go_on = threading.Event()

    def stall(_: int) -> int:
        go_on.wait(20)
        return 200

    with receiving(stall) as slow, receiving() as quick:
        stuck = [add(queue, slow.url, "job.failed") for _ in range(3)]
        made = add(queue, quick.url, "job.failed")
        queue.submit(40)
        render(queue, Outcome.FAILED, limit=64)
        try:
            carrier.turn()
            slow.wait_for(3)
            quick.wait_for(40)
            for _ in range(3):
                carrier.turn()
            assert all(found.attempts <= 1 for webhook in stuck for found in told(queue, webhook))
        finally:
            go_on.set()
        assert carrier.wait(20)
        assert {delivery.state for webhook in (*stuck, made) for delivery in told(queue, webhook)} == {"delivered"}


def test_a_try_that_nobody_came_back_from_is_made_again(queue: Queue, carrier: Courier) -> None:
    """The sweeper that made it was killed: the row says when it counts as lost."""
    with receiving() as receiver:
        made = add(queue, receiver.url)
        queue.do(webhooks.ping, queue.project, made.id)
        lost = Courier(queue.settings, queue.database)
        (taken,) = lost._take(made.id)
        lost.close()
        carry(carrier)
        assert receiver.seen == []
        due_now(queue)
        carry(carrier)
        (delivery,) = told(queue, made)
        assert (delivery.state, delivery.attempts) == ("delivered", 2)
        lost._record(taken, 500, "came back late")
        assert told(queue, made) == [delivery]


def test_the_sweeper_carries_messages(queue: Queue) -> None:
    stop = threading.Event()
    with receiving() as receiver:
        made = add(queue, receiver.url, "batch.finished")
        settings = queue.settings.model_copy(update={"sweep_every": timedelta(seconds=0.05)})
        running = threading.Thread(target=Sweeper(settings, queue.database).run, args=(stop,))
        running.start()
        try:
            queue.submit(2)
            render(queue)
            (received,) = receiver.wait_for(1)
        finally:
            stop.set()
            running.join(30)
        assert not running.is_alive()
        assert Webhook(made.secret or "").verify(received.body, received.headers)["type"] == "batch.finished"


def test_an_answer_that_never_comes_is_a_failure(queue: Queue) -> None:
    go_on = threading.Event()
    with receiving(lambda _: go_on.wait(20) and 200) as receiver:
        short = queue.settings.model_copy(update={"webhook_timeout": timedelta(seconds=0.3)})
        carrier = Courier(short)
        made = add(queue, receiver.url)
        queue.do(webhooks.ping, queue.project, made.id)
        carry(carrier)
        go_on.set()
        carrier.close()
        (delivery,) = told(queue, made)
        assert (delivery.state, delivery.last_error) == ("waiting", "no answer within 0.3 s")


def test_a_name_is_looked_up_once_and_the_connection_goes_to_what_was_checked(
    queue: Queue, carrier: Courier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that answers differently the second time (DNS rebinding) leads nowhere."""
    asked: list[str] = []

    def rebind(name: str, _port: int) -> list[str]:
        asked.append(name)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    monkeypatch.setattr(courier, "resolve", rebind)
    with receiving() as receiver:
        port = receiver.url.rpartition(":")[2]
        made = add(queue, f"http://receiver.example:{port}")
        queue.do(webhooks.ping, queue.project, made.id)
        carry(carrier)
        assert asked == ["receiver.example"]
        assert receiver.seen[0].headers["host"] == f"receiver.example:{port.partition('/')[0]}"
        queue.do(webhooks.ping, queue.project, made.id)
        carry(carrier)
        assert len(receiver.seen) == 1
        assert told(queue, made)[-1].last_error == "the URL leads to an address that is not public"


@pytest.mark.parametrize(
    "answers", [["127.0.0.1"], ["10.0.0.8"], ["93.184.215.14", "169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], []]
)
def test_names_that_lead_inside_are_not_connected_to(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    monkeypatch.setattr(courier, "resolve", lambda *_: answers)
    queue.settings = queue.settings.model_copy(update={"webhook_networks": None})
    carrier = Courier(queue.settings)
    made = add(queue, "https://receiver.example/")
    queue.do(webhooks.ping, queue.project, made.id)
    carry(carrier)
    carrier.close()
    (delivery,) = told(queue, made)
    assert delivery.last_status is None
    assert (delivery.last_error or "").startswith("the URL leads to")


def test_verbs_keep_to_their_project_and_to_their_bounds(queue: Queue) -> None:
    made = add(queue, "https://receiver.example/")
    other = neighbour(queue)
    for verb in (webhooks.get, webhooks.rotate, webhooks.delete, webhooks.ping, webhooks.deliveries):
        with pytest.raises(NotFound):
            queue.do(verb, other, made.id)
    with pytest.raises(NotFound):
        queue.do(webhooks.change, other, made.id, enabled=False, settings=queue.settings)
    assert queue.do(webhooks.every, other) == []
    with pytest.raises(InvalidRequest):
        queue.do(webhooks.rotate, queue.project, made.id, timedelta(days=31))
    for _ in range(webhooks.MOST - 1):
        add(queue, "https://receiver.example/")
    with pytest.raises(Conflict, match="at most"):
        add(queue, "https://receiver.example/")
    queue.do(webhooks.ping, queue.project, made.id)
    queue.do(webhooks.delete, queue.project, made.id)
    assert queue.do(lambda conn: conn.scalar(text("SELECT count(*) FROM webhook_deliveries"))) == 0
    add(queue, "https://receiver.example/")


def test_old_messages_are_forgotten(queue: Queue) -> None:
    made = add(queue, "https://receiver.example/")
    queue.do(webhooks.ping, queue.project, made.id)
    queue.do(lambda conn: conn.execute(text("UPDATE webhook_deliveries SET created_at = now() - interval '29 days'")))
    Sweeper(queue.settings, queue.database).prune()
    assert len(told(queue, made)) == 1
    queue.do(lambda conn: conn.execute(text("UPDATE webhook_deliveries SET created_at = now() - interval '31 days'")))
    Sweeper(queue.settings, queue.database).prune()
    assert told(queue, made) == []
