"""Whoever dies over a registration, it goes on elsewhere or ends with a reason; a late worker changes nothing."""

from __future__ import annotations

from datetime import timedelta
from threading import Event
from typing import Any

import pytest
from sqlalchemy import text

from farm import catalogue, registrations
from farm.db import Database
from farm.holding import Holding, holding, upload
from farm.ids import new_id
from farm.modelfiles import FoundModel
from farm.registrations import Claim, Lost
from farm.settings import Settings

FOUND = FoundModel("a" * 64, "sd15", 1, (), {"width": 512}, {"source": "s3://shelf/x"})


class People:
    """The verbs, each in a transaction of its own."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings.model_copy(
            update={"heartbeat": timedelta(seconds=0.05), "lease": timedelta(seconds=20)}
        )

    def do(self, verb: Any, *arguments: Any, **more: Any) -> Any:
        with self.database.transaction() as conn:
            return verb(conn, *arguments, **more)

    def ask(self, name: str = "toy") -> Any:
        source = "s3://shelf/x"
        return self.do(registrations.ask, name=name, kind="checkpoint", source=source, wanted={}, pool="default")

    def claim(self) -> Claim | None:
        return self.do(registrations.claim, worker=new_id(), settings=self.settings)

    def lapse(self) -> None:
        """Time passes: every lease is over."""
        self.do(lambda conn: conn.execute(text("UPDATE registrations SET lease_until = to_timestamp(0)")))


@pytest.fixture
def people(database: Database, settings: Settings) -> People:
    return People(database, settings)


def test_one_worker_at_a_time_and_the_oldest_first(people: People) -> None:
    first, second = people.ask("first"), people.ask("second")
    claims = [people.claim() for _ in range(3)]
    assert [claim and claim.id for claim in claims] == [first.id, second.id, None]


def test_a_lapsed_lease_is_claimed_again_and_the_late_worker_changes_nothing(people: People) -> None:
    begun = people.ask()
    late = people.claim()
    assert late is not None
    people.lapse()
    heir = people.claim()
    assert heir is not None
    assert (heir.id, heir.attempt) == (begun.id, late.attempt + 1)
    for verb in (
        lambda: people.do(registrations.renew, late, people.settings, 1),
        lambda: people.do(registrations.enter, late, "checking"),
        lambda: people.do(registrations.store, late, FOUND),
        lambda: people.do(registrations.publish, late, FOUND, [], people.settings),
        lambda: people.do(registrations.refuse, late, "no", people.settings),
        lambda: people.do(registrations.give_back, late, people.settings),
    ):
        with pytest.raises(Lost):
            verb()
    assert people.do(catalogue.list_checkpoints) == []
    people.do(registrations.publish, heir, FOUND, ["a note"], people.settings)
    ended = people.do(registrations.get, begun.id)
    assert (ended.state, ended.notes) == ("available", ["a note"])
    assert [view.name for view in people.do(catalogue.list_checkpoints)] == ["toy"]


def test_a_model_that_ends_workers_is_refused(people: People) -> None:
    begun = people.ask()
    claim = people.claim()
    assert claim is not None
    people.do(registrations.enter, claim, "testing")
    for _ in range(registrations.MOST_CRASHES):
        people.lapse()
        assert people.claim() is not None
    people.lapse()
    assert people.claim() is None
    ended = people.do(registrations.get, begun.id)
    assert ended.state == "refused"
    assert ended.reason == "3 workers vanished over it, the last one while testing"


def test_giving_back_is_no_crash(people: People) -> None:
    people.ask()
    for _ in range(registrations.MOST_CRASHES + 2):
        claim = people.claim()
        assert claim is not None
        people.do(registrations.give_back, claim, people.settings)
    assert people.claim() is not None


def test_holding_renews_until_it_is_cancelled(people: People) -> None:
    begun = people.ask()
    claim = people.claim()
    assert claim is not None
    with holding(people.database, people.settings, claim, progress=lambda: 42) as held:
        held.enter("fetching")
        until(lambda: people.do(registrations.get, begun.id).bytes == 42)
        people.do(registrations.cancel, begun.id, people.settings)
        until(lambda: _is_lost(held))
        with pytest.raises(Lost):
            held.enter("checking")
    assert people.do(registrations.get, begun.id).reason == "cancelled"


def test_a_stage_over_its_limit_is_told(people: People) -> None:
    people.ask()
    claim = people.claim()
    assert claim is not None
    told = Event()
    with holding(people.database, people.settings, claim, overdue=lambda _stage: told.set()) as held:
        held.enter("testing", 0.01)
        assert told.wait(10)


def test_an_upload_that_breaks_off_leaves_nothing(people: People) -> None:
    raw = FoundModel("b" * 64, "", 1, ())
    begun = people.do(
        registrations.submit, name="toy", kind="style", source="local:toy", wanted={}, pool="default", raw=raw,
        uploader=new_id(), lease=people.settings.lease,
    )  # fmt: skip
    assert people.claim() is None, "nobody claims what is still being sent"
    claim = registrations.held_by(people.do(registrations.row_of, begun.id))

    def broken() -> None:
        raise OSError("the line is cut")

    with pytest.raises(OSError, match="the line is cut"):
        upload(people.database, people.settings, claim, broken)
    assert people.do(registrations.get, begun.id).state == "refused"
    people.ask("toy")


def _is_lost(held: Holding) -> bool:
    try:
        held.check()
    except Lost:
        return True
    return False


def until(true: Any) -> None:
    """Wait for something that a thread does."""
    waited = Event()
    for _ in range(400):
        if true():
            return
        waited.wait(0.05)
    raise AssertionError("it did not happen")
