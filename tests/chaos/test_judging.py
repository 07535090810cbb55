"""What the suite judges by: canaries are found wherever they sing, standstills excuse what they delayed and no more."""

import time
from pathlib import Path

import pytest

from benchmarks.chaos import KEPT, set_aside
from farm.stack import Servers, settings_from
from tests.chaos import hooks, listening, secrets
from tests.chaos.proxy import Proxy
from tests.chaos.setting import verdict
from tests.chaos.stalls import lately, within
from tests.farm.receivers import Received

WORD = "a-canary-that-nobody-else-sings"
CANARY = {"a canary": WORD}


# On the servers that rows of the suite have started already.
@pytest.mark.xdist_group("chaos-True")
def test_canaries_are_found_on_the_broker_and_in_its_log(durable_servers: Servers, tmp_path: Path) -> None:
    settings = settings_from(durable_servers.environment()).model_copy(update={"redis_prefix": "canaries:"})
    assert listening.in_keys(settings, CANARY) == []
    planted = durable_servers.services[0].program.log.parent / "canary.log.1"
    listener = listening.Listener(settings, CANARY)
    with listening._client(settings) as client:
        try:
            assert [one.what for one in listener.leaks] == ["nothing was heard on the broker"]
            client.set("canaries:string", WORD)
            client.rpush("canaries:list", "", WORD)
            client.sadd("canaries:set", WORD)
            client.hset("canaries:hash", WORD, "")
            client.zadd("canaries:zset", {WORD: 1})
            client.set(f"canaries:{WORD}", "")
            assert len(listening.in_keys(settings, CANARY)) == 6
            planted.write_text(f"password={WORD}")
            assert [one.what for one in secrets.in_files(tmp_path, durable_servers, CANARY)] == [
                "a canary stands in canary.log.1"
            ]
            end = time.monotonic() + 30
            while not listener.heard and time.monotonic() < end:
                client.publish("canaries:/0.celeryev/worker.online", f'{{"hostname": "{WORD}"}}')
                time.sleep(0.01)
            assert [one.what for one in listener.leaks] == [
                "a canary was said on the broker's channel b'canaries:/0.celeryev/worker.online'"
            ]
        finally:
            client.delete(*client.keys("canaries:*"))
            planted.unlink(missing_ok=True)
            listener.close()


def test_canaries_are_found_in_messages_to_webhooks() -> None:
    quiet = Received("/hook", {"webhook-signature": f"v1,{WORD}"}, b"{}")
    assert hooks.leaks([quiet], CANARY) == []
    for one in (
        Received(f"/hook?{WORD}", {}, b""),
        Received("/", {"user-agent": WORD}, b""),
        Received("/", {}, WORD.encode()),
    ):
        assert len(hooks.leaks([quiet, one], CANARY)) == 1


def test_a_standstill_excuses_what_it_delayed() -> None:
    stalls = [(10.0, 20.0), (95.0, 99.0)]
    assert within(stalls, 15, 97) == 7
    assert within(stalls, 21, 94) == 0
    # Looking back from 100 over so many seconds in which the machine ran.
    assert lately(stalls, 0.5, 100) == 0
    assert lately(stalls, 3, 100) == 4
    assert lately(stalls, 80, 100) == 14
    assert lately([(10, 60), (62, 99)], 3, 100) == 37


def test_verdicts_tell_a_kept_bound_from_one_that_was_stretched() -> None:
    assert verdict(4, 4) == "within the bound"
    assert verdict(5, 4, slack=6) == "over the bound, within what a busy machine is allowed"
    assert verdict(5, 4, stood=2, slack=6) == "within the bound but for 2.0 s of a machine that stood still"
    assert verdict(12, 4, stood=1, slack=6) == "over the bound"


def test_a_small_share_of_requests_fails_at_least_once() -> None:
    with Proxy("http://127.0.0.1:1", seed=1) as proxy:
        assert proxy.draw() == ""
        for _ in range(3):
            proxy.cause("busy", 1e-9)
            assert [proxy.draw() for _ in range(3)] == ["busy", "", ""]
        proxy.relent()
        assert proxy.draw() == ""
        assert (proxy.bitten, proxy.spoilt) == (1, 3)


def test_earlier_runs_of_a_seed_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "R1"
    for run in range(KEPT + 3):
        set_aside(folder)
        folder.mkdir()
        (folder / "report.json").write_text(str(run))
    kept = {one.name: (one / "report.json").read_text() for one in tmp_path.iterdir()}
    newest = KEPT + 2
    assert kept == {"R1": str(newest)} | {f"R1.{n}": str(newest - n) for n in range(1, KEPT + 1)}
