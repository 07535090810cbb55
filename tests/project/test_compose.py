"""The containers: what Compose would start, with which secrets, ports, rights and waits; and what the images are."""

import json
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from farm.health import CHECKS
from farm.settings import Seconds, Settings
from tests.project.compose import ROOT, Refused, resolve

SECRETS = ("POSTGRES_PASSWORD", "VALKEY_PASSWORD", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "FLOWER_PASSWORD")
GIVEN = {name: f"{number}f0e1d2c3b4a59687" for number, name in enumerate(SECRETS)}
OURS = ("migrate", "api", "worker", "sweeper", "flower")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MAKE = shutil.which("make") or "make"
NEEDS_SECRETS = {
    "FARM_DATABASE_URL": "POSTGRES_PASSWORD",
    "FARM_REDIS_URL": "VALKEY_PASSWORD",
    "FARM_S3_ACCESS_KEY_ID": "S3_ACCESS_KEY_ID",
    "FARM_S3_SECRET_ACCESS_KEY": "S3_SECRET_ACCESS_KEY",
}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = resolve(GIVEN)["services"]
    return found


def test_everything_the_farm_needs_is_there(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "valkey", "s3", *OURS}


@pytest.mark.parametrize("missing", SECRETS)
def test_no_secret_has_a_default(missing: str) -> None:
    with pytest.raises(Refused, match=missing):
        resolve({name: value for name, value in GIVEN.items() if name != missing})


@pytest.mark.parametrize("name", OURS)
def test_our_processes_get_settings_that_the_farm_accepts(services: dict[str, Any], name: str) -> None:
    environment = services[name]["environment"]
    for variable, secret in NEEDS_SECRETS.items():
        assert GIVEN[secret] in environment[variable]
    unknown = {each for each in environment if each.startswith("FARM_")} - {
        f"FARM_{field.upper()}" for field in Settings.model_fields
    }
    assert not unknown
    given = {each.removeprefix("FARM_").lower(): value for each, value in environment.items()}
    settings = Settings.model_validate(given)
    assert settings.environment == "production"


@pytest.mark.parametrize("name", OURS)
def test_our_containers_have_few_rights(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["command"][0] == "farm", "exec form: SIGTERM reaches the program"
    assert not service.get("privileged")


def test_ports_are_on_the_loopback_only(services: dict[str, Any]) -> None:
    published = {(name, port["target"]) for name, service in services.items() for port in service.get("ports") or []}
    assert published == {("api", 8000), ("s3", 8333), ("flower", 5555)}
    for service in services.values():
        assert {port["host_ip"] for port in service.get("ports") or []} <= {"127.0.0.1"}


def test_images_are_pinned(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name in OURS:
            assert service["build"]["target"] in {"api", "worker"}
        else:
            assert re.search(r":\d+\.\d+", service["image"]), f"{name}: {service['image']}"


def test_services_wait_for_what_they_need(services: dict[str, Any]) -> None:
    for name in ("api", "worker", "sweeper"):
        waits = {needed: how["condition"] for needed, how in services[name]["depends_on"].items()}
        assert waits == {
            "migrate": "service_completed_successfully",
            "postgres": "service_healthy",
            "valkey": "service_healthy",
            "s3": "service_healthy",
        }
    assert services["migrate"]["restart"] == "no"
    assert all(service["restart"] == "unless-stopped" for name, service in services.items() if name != "migrate")


def test_a_leaving_worker_is_given_its_grace(services: dict[str, Any]) -> None:
    worker = services["worker"]
    grace = TypeAdapter(Seconds).validate_python(float(worker["environment"]["FARM_GRACE"]))
    assert int(worker["stop_grace_period"].rstrip("s")) >= grace.total_seconds() + 10


def test_the_worker_reserves_a_gpu(services: dict[str, Any]) -> None:
    devices = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert [(device["driver"], device["capabilities"]) for device in devices] == [("nvidia", ["gpu"])]


def test_every_lasting_service_has_a_health_check(services: dict[str, Any]) -> None:
    in_image = {"api": "api", "worker": "worker"}
    for name, service in services.items():
        if name == "migrate":
            continue
        written = json.dumps(service.get("healthcheck", {}).get("test")) if name not in in_image else DOCKERFILE
        if name in OURS:
            assert re.search(rf'"farm\.health", "{name}"', written)
            assert name in CHECKS
        else:
            assert written != "null"


def test_the_images_run_as_nobody_special_in_exec_form() -> None:
    final = {stage[1]: stage[0] for stage in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    assert final["api"] == final["worker"] == "runtime"
    runtime = DOCKERFILE.split("AS runtime")[1].split("\nFROM ")[0]
    assert re.search(r"^USER (?!0\b)\d+:\d+$", runtime, re.MULTILINE)
    assert not re.search(r"^USER", DOCKERFILE.split("AS runtime")[1].split("\nFROM ", 1)[1], re.MULTILINE)
    for instruction in re.findall(r"^(?:CMD|ENTRYPOINT) (.+)$", DOCKERFILE, re.MULTILINE):
        assert isinstance(json.loads(instruction), list)
    assert DOCKERFILE.count("HEALTHCHECK") == 2


def test_what_the_dockerfile_copies_is_let_in_and_exists() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        copied |= {source.rstrip("/") for source in line.split()[:-1]}
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


def test_make_env_writes_secrets_once(tmp_path: Path) -> None:
    for name in ("Makefile", ".env.example", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([MAKE, ".env"], cwd=tmp_path, check=True, capture_output=True, timeout=30)
    written = (tmp_path / ".env").read_text()
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    values = dict(line.split("=", 1) for line in written.splitlines() if line and not line.startswith("#"))
    assert set(SECRETS) <= set(values)
    assert len({values[name] for name in SECRETS}) == len(SECRETS)
    assert all(re.fullmatch(r"[0-9a-f]{20,}", values[name]) for name in SECRETS)
    assert resolve(values)["services"]["flower"]["environment"]["FARM_FLOWER_PASSWORD"] == values["FLOWER_PASSWORD"]
    subprocess.run([MAKE, ".env"], cwd=tmp_path, check=True, capture_output=True, timeout=30)
    assert (tmp_path / ".env").read_text() == written
