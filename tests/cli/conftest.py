"""The command line in this process, speaking to a farm of paper."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from farm.cli.app import app
from tests.client.conftest import _hurry, fake
from tests.client.fake import FakeFarm

__all__ = ["_hurry", "fake"]

Run = Callable[..., Result]


@pytest.fixture
def run(fake: FakeFarm, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run `farm` with these arguments, in an empty folder, against the fake; its result holds both outputs."""
    monkeypatch.setenv("FARM_URL", fake.url)
    monkeypatch.setenv("FARM_API_KEY", "key-of-ours")
    monkeypatch.delenv("FARM_DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return run
