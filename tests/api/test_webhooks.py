"""Webhooks over HTTP: made, changed, shown without secrets, refused where they would lead inside."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from farm.cli.app import app
from farm.client import AsyncFarm, Farm
from farm.courier import Courier
from tests.api.conftest import Api, problem_of
from tests.farm.receivers import receiving

URL = "https://receiver.example/farm"


def test_a_webhook_from_its_making_to_its_end(api: Api) -> None:
    answer = api.http.post("/webhooks", json={"url": URL})
    assert answer.status_code == 201
    made = answer.json()
    assert made["secret"].startswith("whsec_")
    assert made["events"] == ["batch.failed_share", "batch.finished", "batch.stopped", "job.failed"]
    shown = api.http.get("/webhooks")
    assert [webhook["id"] for webhook in shown.json()["items"]] == [made["id"]]
    path = f"/webhooks/{made['id']}"
    changed = api.http.patch(path, json={"events": ["job.failed"], "enabled": False, "failed_share": 0.5})
    assert changed.status_code == 200
    assert (changed.json()["enabled"], changed.json()["failed_share"]) == (False, 0.5)
    assert changed.json()["url"] == URL
    problem_of(api.http.post(f"{path}/ping"), 409, "conflict")
    assert api.http.patch(path, json={"enabled": True}).json()["enabled"]
    sent = api.http.post(f"{path}/ping")
    assert (sent.status_code, sent.json()["state"]) == (202, "waiting")
    listed = api.http.get(f"{path}/deliveries")
    assert [found["message_id"] for found in listed.json()["items"]] == [sent.json()["message_id"]]
    turned = api.http.post(f"{path}/rotate?overlap=60").json()
    assert turned["secret"] not in {None, made["secret"]}
    for text in (shown.text, changed.text, listed.text, api.http.get(path).text):
        assert made["secret"] not in text
        assert turned["secret"] not in text
    assert api.http.delete(path).status_code == 204
    for _ in range(2):
        problem_of(api.http.delete(path), 404, "not-found")


def test_deliveries_come_in_pages(api: Api) -> None:
    path = f"/webhooks/{api.http.post('/webhooks', json={'url': URL}).json()['id']}"
    sent = [api.http.post(f"{path}/ping").json()["id"] for _ in range(5)]
    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = api.http.get(f"{path}/deliveries", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        found += [delivery["id"] for delivery in page["items"]]
        cursor = page["next_cursor"]
    assert found == sent[::-1]
    problem_of(api.http.get(f"{path}/deliveries?cursor=!"), 422, "invalid-request")


@pytest.mark.parametrize(
    "url",
    [
        "http://receiver.example/",
        "ftp://receiver.example/",
        "//receiver.example/",
        "receiver.example",
        "https://",
        "https:///x",
        "https://127.0.0.1/",
        "https://127.0.0.1:5432/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.0.0.1/",
        "https://0177.0.0.1/",
        "https://017700000001/",
        "https://0/",
        "https://0.0.0.0/",
        "https://10.0.0.1/",
        "https://172.16.0.1/",
        "https://192.168.1.1./",
        "https://169.254.169.254/latest/meta-data/",
        "https://100.64.0.1/",
        "https://198.18.0.1/",
        "https://224.0.0.1/",
        "https://255.255.255.255/",
        "https://[::]/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:7f00:1]/",
        "https://[::127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[2002:7f00:1::]/",
        "https://[2001:0:53aa:64c::1]/",
        "https://[fe80::1]/",
        "https://[fe80::1%25eth0]/",
        "https://[fc00::1]/",
        "https://[fec0::1]/",
        "https://[ff02::1]/",
        "https://[::1",
        "https://localhost/",
        "https://LOCALHOST./",
        "https://a.localhost/",
        "https://postgres/",
        "https://metadata.google.internal/",
        "https://printer.local/",
        "https://user:password@receiver.example/",
        "https://receiver.example@127.0.0.1/",
        "https://127.0.0.1#@receiver.example/",
        "https://receiver.example\\@127.0.0.1/",
        "https://receiver.example/#x",
        "https://receiver.example:0/",
        "https://receiver.example:65536/",
        "https://receiver.example:x/",
        "https://receiver%2eexample/",
        "https://receiver .example/",
        "https://receiver.example/\r\nHost: inside",
        "https://receiver.example/\x00",
        "https://\uff11\uff12\uff17.0.0.1/",
        "https://ⓛocalhost/",
        "https://-.example/",
        "https://receiver..example/",
        "https://" + "a" * 64 + ".example/",
        "https://receiver.example/" + "a" * 2000,
        "file:///etc/passwd",
        "javascript:alert(1)",
        "gopher://127.0.0.1:6379/_FLUSHALL",
    ],
)
def test_urls_that_lead_inside_or_make_no_sense_are_refused(api: Api, url: str) -> None:
    document = problem_of(api.http.post("/webhooks", json={"url": url}), 422, "invalid-request")
    assert [problem["field"] for problem in document["problems"]] == ["url"]
    assert api.http.get("/webhooks").json()["items"] == []
    made = api.http.post("/webhooks", json={"url": URL}).json()
    problem_of(api.http.patch(f"/webhooks/{made['id']}", json={"url": url}), 422, "invalid-request")
    assert api.http.get(f"/webhooks/{made['id']}").json()["url"] == URL


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "https://receiver.example:8443/a?b=c&d=%20",
        "https://1.1.1.1/",
        "https://[2606:4700:4700::1111]/",
        "HTTPS://Receiver.Example./",
        "https://xn--bcher-kva.example/",
        "https://127.0.0.1.receiver.example/",
    ],
)
def test_urls_of_the_public_internet_are_taken(api: Api, url: str) -> None:
    assert api.http.post("/webhooks", json={"url": url}).status_code == 201


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "url"),
        ({"url": 5}, "url"),
        ({"url": URL, "events": []}, "events"),
        ({"url": URL, "events": ["batch.started"]}, "events.0"),
        ({"url": URL, "events": "job.failed"}, "events"),
        ({"url": URL, "events": ["job.failed"] * 5}, "events"),
        ({"url": URL, "failed_share": 0}, "failed_share"),
        ({"url": URL, "failed_share": 1.01}, "failed_share"),
        ({"url": URL, "failed_share": "0.5"}, "failed_share"),
        ({"url": URL, "failed_share": True}, "failed_share"),
        ({"url": URL, "secret": "mine"}, "secret"),
    ],
)
def test_webhooks_that_make_no_sense_are_refused(api: Api, body: dict[str, Any], field: str) -> None:
    document = problem_of(api.http.post("/webhooks", json=body), 422, "invalid-request")
    assert field in [problem["field"] for problem in document["problems"]]
    assert api.http.get("/webhooks").json()["items"] == []


def test_changes_have_a_limit_too(api: Api) -> None:
    made = api.http.post("/webhooks", json={"url": URL}).json()
    body = orjson.dumps({"url": URL + "x" * 300_000})
    answer = api.http.patch(f"/webhooks/{made['id']}", content=body, headers={"Content-Type": "application/json"})
    problem_of(answer, 413, "too-large")


def test_the_client_and_the_command_line_know_webhooks(
    fresh: Callable[..., Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    api = fresh(webhook_networks="127.0.0.0/8")
    monkeypatch.setenv("FARM_URL", api.url)
    monkeypatch.setenv("FARM_API_KEY", api.key)
    monkeypatch.delenv("FARM_DATABASE_URL", raising=False)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["webhooks", *(str(argument) for argument in arguments)])
        assert result.exit_code == 0, result.output
        # The API of this test lives in the same process and writes its log to the same place.
        return "".join(line for line in result.stdout.splitlines(True) if not line.startswith("method="))

    async def awaited() -> None:
        async with AsyncFarm(api.url, api.key) as farm:
            theirs = await farm.webhooks.create(URL, ["job.failed"], failed_share=0.5)
            assert await farm.webhooks.list() == [theirs.model_copy(update={"secret": None})]
            assert (await farm.webhooks.change(theirs.id, enabled=False)).enabled is False
            assert (await farm.webhooks.rotate(theirs.id)).secret != theirs.secret
            await farm.webhooks.change(theirs.id, enabled=True)
            assert [await farm.webhooks.ping(theirs.id)] == await farm.webhooks.deliveries(theirs.id)
            await farm.webhooks.delete(theirs.id)

    asyncio.run(awaited())
    with receiving() as receiver, Farm(api.url, api.key) as farm:
        secret = run("create", receiver.url, "--event", "batch.finished").strip()
        assert secret.startswith("whsec_")
        (made,) = farm.webhooks.list()
        assert receiver.url in run("list")
        assert run("ping", made.id).startswith("msg_")
        carrier = Courier(api.settings)
        carrier.turn()
        receiver.wait_for(1)
        carrier.close()
        (delivery,) = farm.webhooks.deliveries(made.id)
        assert delivery.state == "delivered"
        assert "delivered" in run("deliveries", made.id)
        assert "is off" in run("change", made.id, "--off")
        assert "off: switched off" in run("list")
        assert run("rotate", made.id, "--overlap", 0).strip() not in {"", secret}
        assert orjson.loads(run("change", made.id, "--on", "--json"))["enabled"] is True
        assert run("delete", made.id) == f"{made.id} deleted\n"
        assert farm.webhooks.list() == []
