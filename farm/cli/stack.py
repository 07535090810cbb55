"""`farm up`, `farm down`, `farm status`: the farm of this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.display import ago, json_line, seconds, size, table, waiting
from farm.cli.exits import report
from farm.cli.options import DATA_DIR, AsJson, DataDir, connect
from farm.cli.saying import say
from farm.errors import FarmError, StackError

if TYPE_CHECKING:
    from farm.stack.service import ServiceStatus
    from farm.views import LaneView, WorkerView


def up(
    data_dir: DataDir = DATA_DIR,
    port: Annotated[int, typer.Option(help="The API's port; 0 takes a free one.", min=0, max=65535)] = 8000,
) -> None:
    """Start everything on this machine and keep it running until Ctrl-C or `farm down`."""
    from farm.stack.stack import Stack

    stack = Stack(data_dir, port, report=_say)

    def ready() -> None:
        where = "" if data_dir == DATA_DIR else f" --data-dir {data_dir}"
        say(f"The farm is up at {stack.url}; its key stands in {data_dir / 'credentials.json'}.")
        say(f'Try: farm render "A single split crack on a concrete wall"{where}. Ctrl-C stops the farm.')

    stack.serve(ready)
    say("The farm has stopped.")


def _say(status: "ServiceStatus", event: str) -> None:
    if event:
        say(f"{status['name']}: {event}", err=True)
    else:
        say(f"{status['name']:<10} {status['address']}")


def down(data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Stop the farm that runs in the data directory, and whatever a killed one left behind."""
    from farm.stack import stop_running

    with waiting("stopping the farm"):
        found = stop_running(data_dir)
    if as_json:
        json_line({"was_running": found})
    else:
        say("The farm has stopped." if found else f"No farm was running in {data_dir}.")


def status(data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Services with pid and address, the queue lane by lane, and workers with what they keep warm."""
    services = _services(data_dir)
    lanes: list[LaneView] = []
    workers: list[WorkerView] = []
    failure: FarmError | None = None
    try:
        with connect(data_dir) as farm:
            lanes, workers = farm.queue(), farm.workers()
    except FarmError as error:
        failure = error
    # An API that does not answer is no empty queue: the error that follows says what is wrong.
    if as_json:
        json_line(
            {
                "services": services,
                "lanes": None if failure else [lane.model_dump(mode="json") for lane in lanes],
                "workers": None if failure else [worker.model_dump(mode="json") for worker in workers],
            }
        )
    else:
        _show_services(services)
        if failure is None:
            _show_work(lanes, workers)
    if failure is not None:
        raise failure


def _services(data_dir: Path) -> list[dict[str, Any]]:
    """The services of this machine; none where no farm was ever started."""
    if not (data_dir / "stack.json").exists():
        return []
    from farm.stack import status as services

    try:
        found = services(data_dir)
    except StackError as error:
        report(error)
        return []
    return [{name: each[name] for name in ("name", "pid", "address", "state")} for each in found]


def _show_services(services: list[dict[str, Any]]) -> None:
    if services:
        rows = [(each["name"], each["state"], each["pid"], each["address"]) for each in services]
        table(("SERVICE", "STATE", "#PID", "ADDRESS"), rows, "")


def _show_work(lanes: "list[LaneView]", workers: "list[WorkerView]") -> None:
    table(
        ("LANE", "CHECKPOINT", "POOL", "#QUEUED", "#RUNNING", "#OLDEST", "#IMAGES/S"),
        (
            (
                lane.lane[:12],
                lane.checkpoint,
                lane.pool,
                lane.depth,
                lane.running,
                seconds(lane.oldest_age_seconds),
                f"{lane.images_per_second:.2f}",
            )
            for lane in lanes
        ),
        "The queue is empty.",
    )
    table(
        ("WORKER", "STATE", "HOST", "#PID", "DEVICE", "#RUNNING", "HEARTBEAT", "WARM"),
        (
            (
                str(worker.id)[-12:],
                worker.state,
                worker.host,
                worker.pid,
                worker.device,
                worker.running,
                ago(worker.heartbeat_at),
                ", ".join(_warm(entry) for entry in worker.warm),
            )
            for worker in workers
        ),
        "No worker is there.",
    )
    caches = [(worker, worker.cache) for worker in workers if worker.cache]
    if caches:
        table(
            ("WORKER", "#ON DEVICE", "#IN HOST", "WAITING", "#CHECKPOINT HITS", "#LOADS", "#LOADING", "#ADAPTER HITS"),
            (_cache(str(worker.id)[-12:], cache) for worker, cache in caches),
            "",
        )

    resting = [(worker, rest) for worker in workers for rest in worker.resting]
    if resting:
        table(
            ("WORKER", "RESTS FROM", "LANE", "#FAILED IN A ROW", "LAST BY", "#FOR"),
            (
                (
                    str(worker.id)[-12:],
                    rest.checkpoint,
                    rest.hash[:12] if rest.of == "lane" else "all",
                    rest.failures,
                    rest.code,
                    seconds(rest.seconds),
                )
                for worker, rest in resting
            ),
            "",
        )


def _cache(worker: str, cache: dict[str, Any]) -> tuple[object, ...]:
    """How well a worker's cache serves, in one row."""
    checkpoints, adapters = cache.get("checkpoints", {}), cache.get("adapters", {})
    return (
        worker,
        _of(cache.get("device_bytes"), cache.get("device_budget")),
        _of(cache.get("host_bytes"), cache.get("host_budget")),
        ", ".join(_warm(entry) for entry in cache.get("waiting", [])),
        _share(checkpoints.get("hit_rate")),
        checkpoints.get("loads"),
        seconds(checkpoints.get("load_seconds")),
        _share(adapters.get("hit_rate")),
    )


def _of(part: float | None, whole: float | None) -> str:
    return "" if part is None or whole is None else f"{size(part)} of {size(whole)}"


def _share(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.0%}"


def _warm(entry: dict[str, Any]) -> str:
    """A checkpoint a worker keeps, by name, with its weight on the device."""
    checkpoint = str(entry.get("checkpoint", "?"))
    room = f" ({size(entry['bytes'])})" if isinstance(entry.get("bytes"), int | float) else ""
    return checkpoint + room
