"""What is installed and what is imported: the wheel's contents, torch's corner, the arrows between packages."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `pip install .` builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_everything_that_runs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"farm/py.typed", "migrations/env.py", "migrations/versions/0001_create_the_farm.py"} <= names
    assert {
        f"farm/assets/crack-tiny/{file}"
        for file in ("model_index.json", "profile.json", "lcm-lora.safetensors", "tokenizer/tokenizer.json")
    } <= names
    written = {
        str(path.relative_to(ROOT))
        for package in ("farm", "workers", "api", "migrations")
        for path in (ROOT / package).rglob("*.py")
    }
    assert written <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/")) or "__pycache__" in name]


def test_the_installed_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "from farm.db import alembic_config; from alembic.script import ScriptDirectory;"
        "import farm, pathlib; print(ScriptDirectory.from_config(alembic_config()).get_current_head());"
        "print((pathlib.Path(farm.__file__).parent / 'assets/crack-tiny/model_index.json').exists())"
    )
    answer = run_python(program, cwd=tmp_path)
    assert answer.splitlines()[1] == "True"
    assert answer.splitlines()[0].startswith("0")


def test_importing_all_of_farm_and_api_loads_no_torch() -> None:
    program = (
        "import importlib, pkgutil, sys\n"
        "import api, farm\n"
        "for package in (farm, api):\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not found.name.endswith('__main__') and found.name != 'farm.flower':\n"
        "            importlib.import_module(found.name)\n"
        f"print(sorted(set(sys.modules) & {set(HEAVY)!r}))\n"
    )
    assert run_python(program, cwd=ROOT).strip() == "[]"


def test_a_producer_needs_nothing_heavy() -> None:
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert not names & set(HEAVY)


def test_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_requirement_is_pinned_and_its_pin_allowed() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonical(name): version for name, version in (line.split("==") for line in lines)}
    wanted = [
        Requirement(line)
        for line in (
            *PROJECT["dependencies"],
            *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
        )
    ]
    for requirement in wanted:
        pin = pins.get(canonical(requirement.name))
        assert pin, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement} does not allow its pin {pin}"


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def run_python(program: str, cwd: Path) -> str:
    """What a program prints in a process of its own, which sees `cwd` before anything installed."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(cwd)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
