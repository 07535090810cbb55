"""What the API tells of workers."""

from uuid import uuid4

from farm import jobs
from tests.api.conftest import Api


def test_workers_tell_what_is_warm_and_how_well_their_caches_serve(api: Api) -> None:
    worker, warm = uuid4(), [{"checkpoint": "c" * 64, "adapters": [], "bytes": 7, "load_seconds": 0.5}]
    cache = {"checkpoints": {"hit_rate": 0.75, "loads": 1, "load_seconds": 0.5}, "device_bytes": 7, "waiting": []}
    with api.database.transaction() as conn:
        jobs.hello(conn, worker=worker, pool="default", host="here", pid=1, device="cpu", version="1")
        jobs.tell(conn, worker=worker, state="idle", warm=warm, cache=cache)
    (told,) = api.http.get("/workers").json()["items"]
    assert (told["id"], told["state"], told["cache"]) == (str(worker), "idle", cache)
    assert (told["warm"][0]["hash"], told["warm"][0]["load_seconds"]) == ("c" * 64, 0.5)
