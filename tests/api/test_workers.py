"""What the API tells of workers and of how quick they are."""

from uuid import uuid4

from sqlalchemy import text

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


def test_a_batch_and_its_lane_tell_their_rate_and_what_is_left_of_their_time(api: Api) -> None:
    batch = api.submit(12)["id"]
    api.render(2)

    def told() -> tuple[float, float | None, float]:
        (lane,) = api.http.get("/queue").json()["items"]
        assert (lane["depth"], lane["running"]) == (10, 0)
        found = api.http.get(f"/batches/{batch}").json()
        return found["images_per_second"], found["eta_seconds"], lane["images_per_second"]

    def since(age: str, *rendered: tuple[str, int]) -> None:
        """The batch is so old, and so many were rendered so long ago."""
        with api.database.transaction() as conn:
            conn.execute(text("DELETE FROM rates"))
            conn.execute(text(f"UPDATE batches SET created_at = clock_timestamp() - interval '{age}'"))
            for ago, count in rendered:
                slot = f"SELECT clock_timestamp() - interval '{ago}', id, batch_id, {count} FROM segments"
                conn.execute(text(f"INSERT INTO rates (slot, segment_id, batch_id, succeeded) {slot}"))

    since("1 hour", ("2 minutes", 600), ("40 seconds", 12), ("5 seconds", 8))
    assert told() == (0.333, 30.0, 0.333), "20 within the last minute, 10 to come"
    # Younger than a moment, so that no time passes for it on a slow machine.
    since("-1 minute", ("5 seconds", 8))
    assert told() == (1.6, 6.2, 0.133), "a young batch is measured by its own life, of 5 seconds at least"
    since("1 hour", ("2 minutes", 600))
    assert told() == (0.0, None, 0.0), "nothing moves, and nobody knows how long"
    since("1 hour", ("5 seconds", 60))
    assert told() == (1.0, 10.0, 1.0)
    api.http.post(f"/batches/{batch}/pause").raise_for_status()
    assert told() == (1.0, None, 1.0), "paused, it never ends"
    api.http.post(f"/batches/{batch}/cancel").raise_for_status()
    assert api.http.get("/queue").json()["items"] == []
    assert api.http.get(f"/batches/{batch}").json()["eta_seconds"] == 0.0
