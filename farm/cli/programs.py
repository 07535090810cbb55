"""The parts one by one, as Compose runs them: `farm api|worker|sweeper|flower|migrate`, and `farm version`."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from farm.cli.display import json_line
from farm.cli.local import environment, settings
from farm.cli.options import DATA_DIR, AsJson, DataDir
from farm.cli.saying import say


def api(data_dir: DataDir = DATA_DIR) -> None:
    """Run the API, configured by FARM_* variables or by the farm in the data directory."""
    _become("api.main", environment(data_dir))


def worker(
    data_dir: DataDir = DATA_DIR,
    pool: Annotated[str | None, typer.Option(help="The pool to serve (FARM_POOL).", show_default=False)] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda:N or mps (FARM_DEVICE).", show_default=False)
    ] = None,
) -> None:
    """Run one worker on one device."""
    chosen = {"FARM_POOL": pool, "FARM_DEVICE": device}
    _become("workers.main", environment(data_dir) | {name: value for name, value in chosen.items() if value})


def sweeper(
    data_dir: DataDir = DATA_DIR,
    pulse: Annotated[
        Path | None,
        typer.Option(help="A file to touch every 5 s while no duty hangs, for health checks.", show_default=False),
    ] = None,
) -> None:
    """Run the sweeper: rescue, retries, doorbells, counters, deletions. Any number may run."""
    from farm import logs
    from farm.maintenance import Sweeper

    configured = settings(data_dir)
    logs.configure(configured)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    beat = pulse.touch if pulse else lambda: None
    sweeping = Sweeper(configured)
    sweeping.wait_for_schema(stop, beat)
    sweeping.run(stop, beat)


def flower(
    data_dir: DataDir = DATA_DIR,
    address: Annotated[str, typer.Option(envvar="FLOWER_ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="FLOWER_PORT", help="Where to listen.")] = 5555,
) -> None:
    """Run Flower, read-only, behind the password in FARM_FLOWER_PASSWORD."""
    configured = settings(data_dir)
    if configured.flower_password is None:
        raise typer.BadParameter("set FARM_FLOWER_PASSWORD; without a password anybody could look", param_hint="flower")
    # Through the environment, because everybody on a machine may read command lines.
    options = {
        "FLOWER_ADDRESS": address,
        "FLOWER_PORT": str(port),
        "FLOWER_BASIC_AUTH": f"{configured.flower_user}:{configured.flower_password.get_secret_value()}",
        "FLOWER_READ_ONLY": "true",
    }
    _become("farm.flower", environment(data_dir) | options)


def migrate(data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Bring a farm's servers up to this version: schema, bucket, and the model that comes with it. Harmless twice."""
    from farm import catalogue, db
    from farm.storage import Store

    configured = settings(data_dir)
    before, after = db.migrate(configured)
    if not as_json:
        say(f"schema: {after}" if before == after else f"schema: {before or 'none'} -> {after}")
    store = Store(configured)
    store.ensure_bucket()
    if not as_json:
        say(f"bucket: {configured.s3_bucket}")
    database = db.Database(configured, pool_size=1)
    try:
        with database.transaction() as conn:
            catalogue.install_default(conn, store)
    finally:
        database.dispose()
    if as_json:
        model = catalogue.DEFAULT_CHECKPOINT
        json_line({"schema_before": before, "schema": after, "bucket": configured.s3_bucket, "model": model})
    else:
        say(f"model: {catalogue.DEFAULT_CHECKPOINT}")


def version(as_json: AsJson = False) -> None:
    """The version of the farm that is installed here."""
    from farm import __version__

    if as_json:
        json_line({"version": __version__})
    else:
        say(__version__)


def _become(module: str, variables: dict[str, str]) -> NoReturn:
    """Replace this process, so that signals reach the program itself. `farm` may not import the other packages."""
    os.execve(sys.executable, [sys.executable, "-u", "-m", module], variables)  # noqa: S606
