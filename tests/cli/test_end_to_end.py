"""A whole farm with the default model: first the demo, then one that stays for the command line and for README."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orjson
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

from farm.cli.app import app
from farm.cli.exits import Exit
from farm.models import SCHEMA_VERSION
from farm.painter import Scene, paint
from farm.stack import running
from farm.stack.stack import Stack
from tests.readers import blocks, python, shell

# In one process, where tests run in several: the farm it starts takes longer than all that is done with it.
pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("end-to-end")]

Farm = Callable[..., Result]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder of this module's own that other users may walk through, as PostgreSQL may run as one of them."""
    folder = Path(tempfile.mkdtemp(prefix="farm-cli-"))
    folder.chmod(0o711)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    shutil.rmtree(folder, ignore_errors=True)


def _farm(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture(scope="module")
def demonstration(home: Path) -> tuple[Result, set[int]]:
    """What `farm demo` said, and the processes it left behind."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    result = _farm("demo", "--data-dir", home)
    return result, {process.pid for process in psutil.Process().children(recursive=True)} - before


@pytest.fixture(scope="module")
def farm(home: Path, demonstration: tuple[Result, set[int]]) -> Iterator[Farm]:
    """`farm` with the data directory of the demo, in which a farm is running."""
    data_dir = home / "demo"
    with Stack(data_dir, 0):

        def farm(*arguments: object, stdin: str | None = None) -> Result:
            return _farm(*arguments, "--data-dir", data_dir, stdin=stdin)

        yield farm


@pytest.fixture(scope="module")
def reader(home: Path, farm: Farm) -> Path:
    """Where README's reader stands: a folder in which `.farm` is the data directory of a farm that runs."""
    folder = home / "reader"
    folder.mkdir()
    (folder / ".farm").symlink_to(home / "demo")
    return folder


def test_the_farm_is_started_once(request: pytest.FixtureRequest) -> None:
    """Test processes that do not know of the group start one each, and nobody would notice but by the time."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@end-to-end")


def test_the_demo(home: Path, demonstration: tuple[Result, set[int]]) -> None:
    result, left = demonstration
    assert result.exit_code == 0, result.output
    assert not left, "everything it started is stopped"
    assert running(home / "demo") is None
    pictures = sorted(home.glob("demo-out/0*.png"))
    assert len(pictures) == 4
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            assert picture.info["parameters"]
            low, high = picture.convert("L").getextrema()
            assert high - low > 10, "something is to be seen"
        assert str(path.relative_to(home)) in result.stdout
    with Image.open(home / "demo-out/contact-sheet.png") as sheet:
        assert min(sheet.size) > 500
    assert "How to go on" in result.stdout
    for stage in ("start", "submit", "render", "download", "stop", "all together"):
        assert stage in result.stdout


def test_rendering_uses_the_farm_that_runs(home: Path, farm: Farm) -> None:
    result = farm(
        "render", "A crack on a wall", "--seed", 5, "--count", 2, "--format", "jpeg", "--out", "here", "--json"
    )
    assert result.exit_code == 0, result.output
    assert "starting" not in result.stderr
    lines = [orjson.loads(line) for line in result.stdout.splitlines()]
    assert [line["job"]["seed"] for line in lines] == [5, 6]
    for line in lines:
        with Image.open(home / line["path"]) as picture:
            assert picture.format == "JPEG"
    again = farm("replay", lines[0]["job"]["id"], "--wait")
    assert again.exit_code == 0, again.output
    # Alone where it was one of two: at most a level apart as drawn, which a JPEG may show as a few.
    assert "pixel by pixel" in again.stdout or re.search(r"at most \d of 255 levels", again.stdout)


def test_submit_watch_and_download(home: Path, farm: Farm) -> None:
    (home / "walls.csv").write_text("prompt,seed,label.wall\nA crack,1,north\nA wet wall,2,south\n")
    submitted = farm("submit", "walls.csv", "--name", "walls", "--json")
    assert submitted.exit_code == 0, submitted.output
    batch = orjson.loads(submitted.stdout)["id"]
    assert farm("watch", batch).exit_code == 0
    assert farm("download", batch, "--out", "out").exit_code == 0
    assert sorted(path.name for path in (home / "out").iterdir()) == ["000000-1.png", "000001-2.png", "manifest.ndjson"]
    listed = farm("jobs", "--label", "wall=south", "--json").stdout.splitlines()
    assert [orjson.loads(line)["prompt"] for line in listed] == ["A wet wall"]
    refused = farm("submit", "-", "--format", "csv", stdin="prompt,steps\nA crack,4\nA crack,400\n")
    assert refused.exit_code == Exit.USAGE
    assert "line 3: steps" in refused.stderr
    assert farm("delete", batch, "--yes").exit_code == 0
    assert farm("watch", batch).exit_code == Exit.NOT_FOUND


def _pixels(path: Path) -> NDArray[np.int16]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int16)


def test_pictures_from_pictures(home: Path, farm: Farm) -> None:
    """Each is sent, named by jobs of every route, drawn from, listed, and removed once no job names it."""
    wall = paint(Scene("white", direction="none"), 128, 128, 1).picture
    crack = paint(Scene("concrete", "vertical", "wide"), 128, 128, 2).mask
    half = np.zeros((128, 128), np.uint8)
    half[:, 64:] = 255
    for name, pixels in {"wall": wall, "crack": crack * np.uint8(255), "half": half}.items():
        Image.fromarray(pixels).save(home / f"{name}.png")
    hashes = {name: hashlib.sha256((home / f"{name}.png").read_bytes()).hexdigest() for name in ("wall", "crack")}
    sent = farm("upload", "wall.png", "crack.png")
    assert sent.stdout.splitlines() == [f"{hash_}  {name}.png" for name, hash_ in hashes.items()], sent.output

    made: list[str] = []

    def rendered(*arguments: object) -> NDArray[np.int16]:
        result = farm("render", "A crack on a concrete wall", "--seed", 3, *arguments, "--out", "from", "--json")
        assert result.exit_code == 0, result.output
        told = orjson.loads(result.stdout)
        made.append(told["job"]["id"])
        return _pixels(home / told["path"])

    # By hash, by file and by both; the file that was not sent before is sent on the way.
    anew = rendered("--image", hashes["wall"], "--strength", 0.25)
    inpainted = rendered("--image", "wall.png", "--mask", "half.png")
    followed = rendered("--control", "crack-tiny-mask=crack.png")
    source = wall.astype(np.int16)
    assert 0 < np.abs(anew - source).mean() < np.abs(followed - source).mean(), "a quarter drawn anew is like it"
    assert np.array_equal(inpainted[:, :64], source[:, :64])
    assert not np.array_equal(inpainted[:, 64:], source[:, 64:])
    assert followed[crack].mean() < followed[~crack].mean() - 10, "dark where the mask is white"

    rows = [
        {"prompt": "A crack", "seed": 3, "image": hashes["wall"], "mask": hashes["crack"]},
        {"prompt": "A crack", "seed": 3, "controls": [{"name": "crack-tiny-mask", "image": hashes["crack"]}]},
    ]
    lines = b"\n".join(map(orjson.dumps, rows)).decode()
    submitted = farm("submit", "-", "--format", "ndjson", "--json", stdin=lines)
    assert submitted.exit_code == 0, submitted.output
    batch = orjson.loads(submitted.stdout)["id"]
    assert farm("watch", batch).exit_code == 0
    assert farm("download", batch, "--out", "drawn").exit_code == 0
    masked = _pixels(home / "drawn" / "000000-3.png")
    assert np.array_equal(masked[~crack], source[~crack])
    assert not np.array_equal(masked[crack], source[crack])

    listed = [orjson.loads(line) for line in farm("uploads", "list", "--json").stdout.splitlines()]
    assert {one["hash"] for one in listed} > set(hashes.values())
    assert [(one["media_type"], one["width"], one["height"]) for one in listed] == [("image/png", 128, 128)] * 3
    assert hashes["wall"] in farm("uploads", "list").stdout
    unknown = farm("render", "A crack", "--image", "a" * 64)
    assert unknown.exit_code == Exit.USAGE
    assert "image: there is no upload" in unknown.stderr
    refused = farm("uploads", "remove", hashes["wall"])
    assert refused.exit_code == Exit.FAILED
    assert "delete them first" in refused.stderr
    made += (orjson.loads(line)["id"] for line in farm("jobs", "--batch", batch, "--json").stdout.splitlines())
    assert farm("delete", *made, "--yes").exit_code == 0
    removed = farm("uploads", "remove", *(one["hash"] for one in listed))
    assert removed.stdout.splitlines() == [f"{one['hash']} removed" for one in listed], removed.output
    assert farm("uploads", "list").stdout == "There are no uploads.\n"
    assert farm("uploads", "remove", hashes["wall"]).exit_code == Exit.NOT_FOUND


def test_status(farm: Farm) -> None:
    result = farm("status", "--json")
    assert result.exit_code == 0, result.output
    told = orjson.loads(result.stdout)
    assert {"postgres", "valkey", "s3", "api", "worker", "sweeper", "flower"} <= {
        each["name"] for each in told["services"] if each["state"] == "healthy" and each["pid"] and each["address"]
    }
    assert [worker["state"] in {"idle", "busy"} for worker in told["workers"]] == [True]
    shown = farm("status")
    assert "crack-tiny" in shown.stdout, "what the worker keeps warm"


def test_models_and_keys_and_migrate_work_on_the_servers_themselves(farm: Farm) -> None:
    kinds = {
        line["name"]: line["kind"] for line in map(orjson.loads, farm("models", "list", "--json").stdout.splitlines())
    }
    assert kinds == {
        "crack-tiny": "checkpoint",
        "crack-tiny-lcm": "acceleration",
        "crack-tiny-mask": "controlnet",
        "crack-tiny-night": "style",
    }
    assets = Path(__file__).parents[2] / "farm" / "assets" / "crack-tiny"
    stray = farm("models", "add", "twin", assets / "lcm-lora.safetensors", "--project", "defualt")
    assert stray.exit_code == Exit.USAGE, stray.output
    assert "did you mean default?" in stray.stderr
    added = farm("models", "add", "twin", assets / "lcm-lora.safetensors", "--project", "default", "--json")
    assert added.exit_code == 0, added.output
    told = orjson.loads(added.stdout)
    assert (told["state"], told["family"], told["kind"]) == ("available", "crack-tiny", "style")
    assert told["project"] == "default"
    rendered = farm("render", "A crack", "--adapter", "twin:-0.2", "--out", "twin.png", "--json")
    assert rendered.exit_code == 0, rendered.output
    with Image.open(orjson.loads(rendered.stdout)["path"]) as picture:
        assert "local:lcm-lora.safetensors" in picture.info["farm"]
    (first, *_) = map(orjson.loads, farm("models", "registrations", "--json").stdout.splitlines())
    assert (first["name"], first["id"]) == ("twin", told["id"])
    assert farm("models", "add", "twin", assets / "lcm-lora.safetensors").exit_code == Exit.FAILED
    assert farm("models", "add", "nothing", assets / "profile.json").exit_code == Exit.USAGE
    assert orjson.loads(farm("models", "remove", "twin", "--json").stdout) == {"name": "twin", "removed": True}
    assert farm("models", "remove", "twin").exit_code == Exit.NOT_FOUND
    made = farm("keys", "create", "ci", "--project", "other")
    assert made.exit_code == 0, made.output
    key = next(
        line for line in farm("keys", "list", "--json").stdout.splitlines() if orjson.loads(line)["name"] == "ci"
    )
    assert made.stdout.startswith(orjson.loads(key)["prefix"])
    revoked = orjson.loads(farm("keys", "revoke", orjson.loads(key)["id"], "--json").stdout)
    assert revoked == {"id": orjson.loads(key)["id"], "revoked": True}
    assert "crack-tiny" in farm("migrate").stdout
    told = orjson.loads(farm("migrate", "--json").stdout)
    assert told == {"schema_before": SCHEMA_VERSION, "schema": SCHEMA_VERSION, "bucket": "farm", "model": "crack-tiny"}


def test_the_readmes_commands_in_order(reader: Path) -> None:
    scripts = [block for block in blocks("sh") if "farm " in block]
    assert len(scripts) == 3, "render, submit, watch"
    said = ""
    for script in scripts:
        before, _, after = script.partition("farm download BATCH")
        said += (printed := shell(before, reader))
        if after:
            batch = re.findall(r"^batch ([0-9a-f-]{36}): 3 jobs$", printed, re.MULTILINE)[-1]
            said += shell(f"farm download {batch}{after}", reader)
    with Image.open(reader / "crack.png") as picture:
        assert picture.info["parameters"].startswith("A single split crack on a concrete wall")
    assert len(list((reader / "pictures").glob("*.png"))) == 3
    assert (reader / "pictures/manifest.ndjson").read_text().count("\n") == 3
    assert "Water draining down" in said, "jobs by label"
    assert "crack-tiny" in said, "status"
    assert "walls" in said, "batches"


def test_the_readmes_python_example(reader: Path) -> None:
    (example,) = blocks("python")
    assert python(example, reader).startswith("8 of 8 pictures\n")
    assert len(list((reader / "cracks").glob("*.png"))) == 8
