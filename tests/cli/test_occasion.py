"""`farm render` where no farm runs: it starts one, of paper here, and stops it however it ends."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from farm.cli import local
from farm.cli.exits import Exit
from farm.errors import StackError
from tests.cli.conftest import Run
from tests.client.fake import FakeFarm, Reply, batch_document, job_document, serve_pictures


class PaperStack:
    """In place of `farm.stack.stack.Stack`; what is asked of it stands in `did`, with the data directory."""

    def __init__(self, url: str, up: Callable[[], None] = lambda: None) -> None:
        self.url = url
        self.did: list[object] = []
        self.starting = up

    def __call__(self, data_dir: Path, port: int, report: object) -> "PaperStack":
        self.did.append((data_dir.absolute(), port))
        self.data_dir = data_dir
        return self

    def up(self) -> None:
        self.did.append("up")
        self.starting()
        self.data_dir.mkdir(exist_ok=True)
        (self.data_dir / "credentials.json").write_text(json.dumps({"url": self.url, "api_key": "its-key"}))

    def look(self) -> None:
        self.did.append("look")

    def down(self) -> None:
        self.did.append("down")


@pytest.fixture
def stack(run: Run, fake: FakeFarm, monkeypatch: pytest.MonkeyPatch) -> PaperStack:
    """`run` now finds no farm, and this is what it starts."""
    for name in ("FARM_URL", "FARM_API_KEY"):
        monkeypatch.delenv(name)
    made = PaperStack(fake.url)
    monkeypatch.setattr("farm.stack.stack.Stack", made)
    return made


def test_render_starts_a_farm_looks_after_it_and_stops_it(
    run: Run, fake: FakeFarm, stack: PaperStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LOOK_EVERY", 0.02)
    batch = serve_pictures(fake, job_document())
    fake.on("POST", "/api/v1/jobs", Reply(201, job_document(state="queued", batch_id=batch)))

    def progress(_asked: object) -> Reply:
        done = "look" in stack.did
        return Reply(body=batch_document(1, succeeded=int(done)) | {"id": batch, "counts": counts[done]})

    counts = ({"queued": 1}, {"succeeded": 1})
    fake.on("GET", f"/api/v1/batches/{batch}", progress)
    result = run("render", "A crack", "--data-dir", "here", "--out", "crack.png")
    assert result.exit_code == 0, result.output
    assert Path("crack.png").exists()
    assert fake.asked[0].headers["authorization"] == "Bearer its-key"
    assert stack.did[:2] == [(Path("here").absolute(), 0), "up"], "on a free port"
    assert set(stack.did[2:-1]) == {"look"}, "while it waits, what dies is started again"
    assert stack.did[-1] == "down"


def test_a_farm_that_was_stopped_is_started_again(run: Run, stack: PaperStack) -> None:
    """The credentials and secrets that it left lead nowhere now."""
    Path(".farm").mkdir()
    for name in ("credentials.json", "secrets.json"):
        Path(".farm", name).write_text('{"url": "http://127.0.0.1:1", "api_key": "old"}')
    assert run("render", "A crack").exit_code == Exit.NOT_FOUND, "the fake has no such route"
    assert stack.did[1:] == ["up", "down"]


@pytest.fixture
def ignored() -> Iterator[Callable[..., None]]:
    """What SIGTERM and SIGHUP do by themselves here: nothing, as a test that fails must not end its process."""

    def ignore(*_: object) -> None:
        pass

    before = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGHUP)}
    # A process that was started in the background of a script has been told not to hear Ctrl-C.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield ignore
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_what_was_started(
    stack: PaperStack, ignored: Callable[..., None], number: signal.Signals
) -> None:
    with pytest.raises(KeyboardInterrupt), local.some_farm(Path("here")):
        os.kill(os.getpid(), number)
    assert stack.did[1:] == ["up", "down"]
    assert {signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)} == {ignored}


@pytest.mark.usefixtures("ignored")
def test_a_signal_while_it_starts_reaches_the_stack_that_cleans_up(stack: PaperStack) -> None:
    """`Stack.up` leaves nothing behind when it raises."""
    stack.starting = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), local.some_farm(Path("here")):
        pytest.fail("it did not start")
    assert stack.did[1:] == ["up"]


def test_a_farm_that_does_not_start_is_an_error(run: Run, stack: PaperStack) -> None:
    def refuse() -> None:
        raise StackError("the disk is full")

    stack.starting = refuse
    result = run("render", "A crack")
    assert result.exit_code == Exit.FAILED, result.output
    assert "the disk is full" in result.stderr
