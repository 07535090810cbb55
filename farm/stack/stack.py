"""`farm up`: everything on one machine, started in order, kept alive, stopped in order."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self
from uuid import UUID

from farm import jobs
from farm.db import Database
from farm.errors import FarmError, StackError
from farm.ids import new_id
from farm.settings import Settings
from farm.stack import preparation, programs
from farm.stack.datadir import DataDir, stop_rank
from farm.stack.devices import devices
from farm.stack.ports import LOOPBACK, Ports, holder, is_free
from farm.stack.secrets import write_private_json
from farm.stack.servers import Servers, settings_from
from farm.stack.service import Program, Service
from farm.stack.supervision import Report, Supervisor, silent


class Stopped(StackError):
    """The farm was asked to stop before all of it had started."""


class Stack:
    """The farm of one data directory. Use it from one thread, best the main one: see `processes.spawn`."""

    def __init__(self, data_dir: Path, port: int = 8000, report: Report = silent) -> None:
        """`port` is the API's; 0 draws a free one, remembered in the data directory."""
        self.directory = DataDir(data_dir)
        self._port = port
        self._report = report
        self._stop = threading.Event()
        self._servers: Servers | None = None
        self._processes: list[Service] = []
        self._supervisor = Supervisor(report)
        self._database: Database | None = None
        self._settings: Settings | None = None
        self._variables: dict[str, str] = {}

    @property
    def url(self) -> str:
        """Where the API listens; known once `up` has chosen the port."""
        return f"http://{LOOPBACK}:{self._port}"

    @property
    def settings(self) -> Settings:
        """The settings that all processes of this stack share. Raises StackError before `up`."""
        if self._settings is None:
            raise StackError("the farm has no settings before it is up")
        return self._settings

    def environment(self) -> dict[str, str]:
        """The `FARM_*` variables that all processes of this stack get. Empty before `up`."""
        return dict(self._variables)

    @property
    def services(self) -> list[Service]:
        """Every service started so far, in the order in which they are stopped."""
        return [*self._processes, *(self._servers.services if self._servers else [])]

    def up(self) -> None:
        """Start everything and wait until it is healthy; if that fails, nothing is left running.

        Raises StackError (disk, ports, lock, another major version, a program that does not start) or SchemaMismatch.
        """
        self.directory.create()
        self.directory.hold()
        try:
            self.directory.end_orphans()
            self._claim_port()
            self._start_servers()
            preparation.prepare(self.settings, credentials=self.directory.credentials, url=self.url)
            self._start_processes()
        except BaseException:
            self.down()
            raise

    def run_forever(self) -> None:
        """Restart what dies, until `request_stop`."""
        self._supervisor.run(self._stop)

    def look(self) -> None:
        """Restart what died, once: for a caller that has a loop of its own in place of `run_forever`."""
        self._supervisor.look()

    def request_stop(self) -> None:
        """Make `up` or `run_forever` end soon. Safe in a signal handler and from any thread."""
        self._stop.set()

    def down(self) -> None:
        """Stop everything in order: API, workers, sweeper, Flower, then the servers. Harmless when nothing runs."""
        try:
            self._stop_processes()
            if self._database is not None:
                self._database.dispose()
            if self._servers is not None:
                self._servers.stop()
            if self.directory.held:
                self.directory.stack.unlink(missing_ok=True)
                self.directory.environment.unlink(missing_ok=True)
        finally:
            self._processes, self._servers, self._database = [], None, None
            self._supervisor = Supervisor(self._report)
            self.directory.release()

    def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """`up`, `run_forever` and `down`, where Ctrl-C, SIGTERM and SIGHUP mean: stop in order.

        `ready` is called once, when everything is healthy.
        """
        with self._signals():
            try:
                self.up()
                ready()
                self.run_forever()
            except Stopped:
                return
            finally:
                self.down()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def _claim_port(self) -> None:
        if self._port == 0:
            self._port = Ports(self.directory.ports).choose(["api"])["api"]
        elif not is_free(self._port):
            raise StackError(
                f"port {self._port} on {LOOPBACK} is in use{holder(self._port)}; choose another one with --port, "
                "or --port 0 for any that is free"
            )

    def _start_servers(self) -> None:
        servers = Servers(self.directory, note=self._note)
        self._servers = servers
        servers.start(self._healthy, self._check_stop)
        self._variables = servers.environment() | {
            "FARM_API_HOST": LOOPBACK,
            "FARM_API_PORT": str(self._port),
            "FARM_FLOWER_PASSWORD": servers.secrets.flower_password,
        }
        self._settings = settings_from(self._variables)
        # For commands of other processes that work on the servers themselves: `farm models add`, `farm keys create`.
        write_private_json(self.directory.environment, self._variables)
        for service in servers.services:
            self._supervisor.watch(service, partial(servers.revived, service))

    def _start_processes(self) -> None:
        """API, workers, sweeper and Flower all load at once; then each is awaited."""
        directory, variables, settings = self.directory, self._variables, self.settings
        database = Database(settings, pool_size=2)
        self._database = database
        flower_port = Ports(directory.ports).choose(["flower"])["flower"]
        # Workers first: theirs is the longest way.
        names = devices()
        for index, device in enumerate(names):
            name = "worker" if len(names) == 1 else f"worker-{index}"
            self._launch_worker(name, device, database)
        self._launch(lambda: programs.api(directory, variables, self._port))
        self._launch(lambda: programs.sweeper(directory, variables))
        self._launch(lambda: programs.flower(directory, variables, settings, flower_port))
        self._processes.sort(key=lambda service: stop_rank(service.name))
        for service in self._processes:
            service.wait_healthy(self._check_stop)
            self._healthy(service)

    def _launch(self, program: Callable[[], Program], died: Callable[[], None] = lambda: None) -> None:
        service = Service(program(), self._note)
        self._processes.append(service)
        self._supervisor.watch(service, program, died)
        service.spawn()

    def _launch_worker(self, name: str, device: str, database: Database) -> None:
        latest: list[UUID] = []

        def program() -> Program:
            # An id of its own for each process: claims of the dead one are never taken for those of the new one.
            latest[:] = [new_id()]
            return programs.worker(
                self.directory, self._variables, database, self.settings, name=name, device=device, worker_id=latest[0]
            )

        def died() -> None:
            try:
                with database.transaction() as conn:
                    jobs.rescue(conn, settings=self.settings, worker=latest[0])
            except FarmError as error:
                self._event(name, f"its jobs are not taken back yet, the sweeper will do so: {error}")

        self._launch(program, died)

    def _stop_processes(self) -> None:
        """The API first, so that nothing new comes in; then the others, whose waits overlap."""
        self._processes.sort(key=lambda service: stop_rank(service.name))
        first = [service for service in self._processes if service.name == "api"]
        others = [service for service in self._processes if service.name != "api"]
        for service in first:
            service.stop()
        for service in others:
            service.ask_to_stop()
        for service in others:
            service.stop()

    def _healthy(self, service: Service) -> None:
        self._report(service.status(), "")

    def _event(self, name: str, event: str) -> None:
        for service in self.services:
            if service.name == name:
                self._report(service.status(), event)

    def _note(self) -> None:
        if self.directory.held:
            self.directory.write_stack([service.status() for service in self.services])

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(_number: int, _frame: FrameType | None) -> None:
            self.request_stop()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
