"""What workers tell of themselves, and what others read of it."""

from sqlalchemy import text

from farm import jobs
from tests.farm.conftest import Queue

KNOWN, GONE = "a" * 64, "b" * 64


def test_what_is_warm_and_how_well_the_cache_serves(queue: Queue) -> None:
    queue.do(jobs.hello, worker=queue.worker, pool="default", host="here", pid=1, device="cpu", version="1")
    name = "INSERT INTO models (name, hash, kind, family, state, bytes) VALUES ('walls', :hash, 'checkpoint', 'sd', "
    queue.do(lambda conn: conn.execute(text(name + "'available', 1)"), {"hash": KNOWN}))
    (fresh,) = queue.do(jobs.workers)
    assert (fresh.warm, fresh.cache) == ([], {})
    warm = [{"checkpoint": GONE, "adapters": [{"hash": KNOWN, "weight": 0.5}], "slots": [{"hash": KNOWN}], "bytes": 7}]
    cache = {"waiting": [{"checkpoint": KNOWN, "bytes": 5}], "checkpoints": {"hit_rate": 0.9}, "host_bytes": 5}
    queue.do(jobs.tell, worker=queue.worker, state="idle", warm=warm, cache=cache)
    (told,) = queue.do(jobs.workers)
    assert told.cache == {**cache, "waiting": [{"checkpoint": "walls", "hash": KNOWN, "bytes": 5}]}
    assert told.warm[0]["checkpoint"] == GONE, "by hash where the name is gone"
    assert told.warm[0]["adapters"] == [{"hash": KNOWN, "weight": 0.5, "name": "walls"}]
    assert told.warm[0]["slots"] == [{"hash": KNOWN, "name": "walls"}]
