"""What is installed and what is imported: the wheel's contents, torch's corner, the arrows between packages."""

import re
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
        for file in (
            "model_index.json",
            "profile.json",
            "README.md",
            "tokenizer/tokenizer.json",
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "lcm-lora.safetensors",
            "style-night.safetensors",
        )
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
    pinned = pins()
    wanted = [
        Requirement(line)
        for line in (
            *PROJECT["dependencies"],
            *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
        )
    ]
    for requirement in wanted:
        pin = pinned.get(canonical(requirement.name))
        assert pin, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement} does not allow its pin {pin}"


@pytest.mark.parametrize("image", ["api", "worker"])
def test_what_ships_is_held_to_hashes_of_the_pinned_versions(image: str) -> None:
    """`make lock` was run after the last pin was moved, and nothing in it is installed without a hash."""
    locked = (ROOT / f"requirements/{image}.txt").read_text().replace("\\\n", "")
    found = {}
    for line in (line for line in locked.splitlines() if line and not line.startswith("#")):
        stated, *hashes = line.split(" --hash=")
        parsed = Requirement(stated)
        assert hashes, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", one) for one in hashes), line
        found[canonical(parsed.name)] = parsed
    pinned = pins()
    for name, requirement in found.items():
        if name in pinned:
            assert str(requirement.specifier) == f"=={pinned[name]}", "run make lock"
        else:
            # What torch's CUDA build needs beside itself, which it pins, and what is not for this system.
            assert name.startswith(("cuda-", "nvidia-", "triton")) or not needed(requirement), name
    wanted = [*PROJECT["dependencies"], "flower", "hatchling"]
    wanted += PROJECT["optional-dependencies"]["worker"] if image == "worker" else []
    assert {canonical(Requirement(line).name) for line in wanted} <= set(found)
    assert ("torch" in found) is (image == "worker")


def needed(requirement: Requirement) -> bool:
    """On Linux with the newest Python 3.11."""
    here = {"sys_platform": "linux", "python_version": "3.11", "python_full_version": "3.11.14"}
    return requirement.marker is None or requirement.marker.evaluate(here)


def test_the_images_install_nothing_else() -> None:
    installs = re.findall(r"pip\W+install\W.*", (ROOT / "Dockerfile").read_text())
    assert len(installs) == 4
    assert sum("--require-hashes" in line for line in installs) == 2
    assert sum("--no-deps --no-build-isolation ." in line for line in installs) == 2, "our own wheel, built offline"


def pins() -> dict[str, str]:
    """Every pinned version by name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


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
