"""The three servers of one machine: PostgreSQL, Valkey and SeaweedFS, started side by side."""

from collections.abc import Callable, Mapping

from farm.errors import StackError
from farm.settings import Settings
from farm.stack import postgres, seaweed, valkey
from farm.stack.datadir import DataDir
from farm.stack.ports import Ports, is_free
from farm.stack.secrets import load_secrets
from farm.stack.service import Program, Service

BUCKET = "farm"
START_TRIES = 3
"""A port that was free a moment ago may be taken when the server gets to it."""
ADDRESS_IN_USE = "address already in use"
"""How PostgreSQL, Valkey and SeaweedFS log it, in lower case."""


def settings_from(environment: Mapping[str, str]) -> Settings:
    """Settings in which these `FARM_*` variables win over what the process's own environment says."""
    named = {name.removeprefix("FARM_").lower(): value for name, value in environment.items()}
    return Settings(**named)  # type: ignore[arg-type]  # strings, as from an environment: pydantic reads them


class Servers:
    """The servers of one data directory, which the caller has created and holds the lock of."""

    def __init__(self, directory: DataDir, *, durable: bool = True, note: Callable[[], None] = lambda: None) -> None:
        """`durable=False` is for tests: no fsync, and no waiting for SeaweedFS to leave."""
        self._directory = directory
        self._durable = durable
        self._note = note
        self._ports = Ports(directory.ports)
        self.secrets = load_secrets(directory.secrets, needed_by=directory.path / "postgres")
        self._cluster: postgres.Cluster | None = None
        self._numbers: dict[str, int] = {}
        self.postgres: Service | None = None
        self.valkey: Service | None = None
        self.s3: Service | None = None

    @property
    def services(self) -> list[Service]:
        """Those started so far, in the order in which they are stopped."""
        return [service for service in (self.s3, self.valkey, self.postgres) if service is not None]

    def environment(self) -> dict[str, str]:
        """The `FARM_*` variables that lead to these servers. Known once `start` has chosen the ports."""
        if self._cluster is None:
            raise StackError("the servers have no ports before they are started")
        numbers, secrets = self._numbers, self.secrets
        return {
            "FARM_ENVIRONMENT": "production",
            "FARM_DATABASE_URL": self._cluster.url(numbers["postgres"]),
            "FARM_REDIS_URL": valkey.url(numbers["valkey"], secrets.valkey_password),
            "FARM_S3_ENDPOINT_URL": seaweed.endpoint(numbers),
            "FARM_S3_REGION": "us-east-1",
            "FARM_S3_BUCKET": BUCKET,
            "FARM_S3_ACCESS_KEY_ID": secrets.s3_access_key,
            "FARM_S3_SECRET_ACCESS_KEY": secrets.s3_secret_key,
        }

    def start(
        self, healthy: Callable[[Service], None] = lambda _: None, check_stop: Callable[[], None] = lambda: None
    ) -> None:
        """Start all three and wait for them; `healthy` is called for each. Nothing is left running if one fails.

        Raises StackError, and whatever `check_stop`, called all the time, raises.
        """
        try:
            # The two that need no preparation get going while initdb works.
            self.s3 = Service(self._s3_program(), self._note)
            self.s3.spawn()
            self.valkey = Service(self._valkey_program(), self._note)
            self.valkey.spawn()
            self._cluster = postgres.prepare(
                self._directory.path,
                password=self.secrets.postgres_password,
                logs=self._directory.logs,
                durable=self._durable,
            )
            self.postgres = Service(self._postgres_program(), self._note)
            self.postgres.spawn()
            makers = (
                (self.postgres, self._postgres_program),
                (self.valkey, self._valkey_program),
                (self.s3, self._s3_program),
            )
            for service, program in makers:
                self._settle(service, program, check_stop)
                healthy(service)
        except BaseException:
            self.stop()
            raise

    def _settle(self, service: Service, program: Callable[[], Program], check_stop: Callable[[], None]) -> None:
        """Wait for health; where it died because somebody took its port, choose another and start it again."""
        for attempt in range(1, START_TRIES + 1):
            try:
                service.wait_healthy(check_stop)
            except StackError as error:
                taken = any(not is_free(self._numbers[name]) for name in self._ports_of(service))
                # Whoever took a port may have left it again; then only the server's own words tell.
                taken = taken or ADDRESS_IN_USE in str(error).lower()
                if service.alive or not taken or attempt == START_TRIES:
                    raise
                service.stop()
                service.program = program()
                service.spawn()
            else:
                return

    def stop(self) -> None:
        """Stop S3, Valkey and PostgreSQL. They know nothing of each other, so all are asked before any is awaited."""
        for service in self.services:
            service.ask_to_stop()
        for service in self.services:
            service.stop()
        if self.s3 is not None:
            seaweed.remove_sockets(self._numbers)

    def revived(self, service: Service) -> Program:
        """The program for a server that died: the same, as everybody knows its address."""
        if service is self.postgres and self._cluster is not None:
            self._cluster.disown_pid_file()
        return service.program

    @staticmethod
    def _ports_of(service: Service) -> tuple[str, ...]:
        return seaweed.PORTS if service.name == "s3" else (service.name,)

    def _choose(self, *names: str, **also: int) -> dict[str, int]:
        self._numbers |= self._ports.choose(names, also=also)
        return self._numbers

    def _postgres_program(self) -> Program:
        if self._cluster is None:
            raise StackError("the cluster is not prepared")
        self._cluster.disown_pid_file()
        return self._cluster.program(self._choose("postgres")["postgres"])

    def _valkey_program(self) -> Program:
        return valkey.program(
            self._directory.path,
            port=self._choose("valkey")["valkey"],
            password=self.secrets.valkey_password,
            logs=self._directory.logs,
        )

    def _s3_program(self) -> Program:
        ports = self._choose(*seaweed.PORTS, admin=seaweed.ADMIN_DISTANCE)
        return seaweed.program(
            self._directory.path,
            ports=ports,
            secrets=self.secrets,
            logs=self._directory.logs,
            durable=self._durable,
        )
