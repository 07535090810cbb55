"""PostgreSQL does not run as root, so another user must get to its programs and its data."""

import os
import shutil
from pathlib import Path

import psycopg
import pytest

from farm.errors import StackError
from farm.stack import accounts, embedded
from farm.stack.accounts import Account, account_for, can_walk, reachable_copy, reachable_home
from tests.stack.watching import identities

STRANGER = Account("stranger", 54321, 54321)


@pytest.fixture
def elsewhere(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies go, instead of a folder of the machine."""
    folder = data_dir.parent / "elsewhere"
    monkeypatch.setattr(accounts, "ELSEWHERE", folder)
    return folder


def test_one_closed_folder_on_the_way_is_enough(data_dir: Path) -> None:
    deep = data_dir / "a" / "b"
    deep.mkdir(parents=True)
    for folder in (data_dir, data_dir / "a", deep):
        folder.chmod(0o711)
    assert can_walk(STRANGER, deep)
    data_dir.chmod(0o700)
    assert not can_walk(STRANGER, deep)
    assert can_walk(Account("me", os.getuid(), os.getgid()), deep)


def test_programs_below_a_closed_folder_are_copied_once(data_dir: Path, elsewhere: Path) -> None:
    programs = data_dir / "programs"
    programs.mkdir(parents=True)
    (programs / "run").write_text("#!/bin/sh\n")
    (programs / "run").chmod(0o700)
    assert reachable_copy(None, [programs], "tool-1") == data_dir
    data_dir.chmod(0o700)
    copy = reachable_copy(STRANGER, [programs], "tool-1")
    assert copy == elsewhere / "programs" / "tool-1"
    assert can_walk(STRANGER, copy / "programs")
    assert (copy / "programs" / "run").stat().st_mode & 0o777 == 0o755
    inode = copy.stat().st_ino
    assert reachable_copy(STRANGER, [programs], "tool-1").stat().st_ino == inode
    assert [path.name for path in copy.parent.iterdir()] == ["tool-1"]


def test_a_home_that_was_closed_later_is_a_clear_error(data_dir: Path, elsewhere: Path) -> None:
    home = data_dir / "postgres"
    home.mkdir(parents=True)
    data_dir.chmod(0o700)
    with pytest.raises(StackError, match=r"cannot reach .*postgres: a folder above it is closed"):
        reachable_home(STRANGER, home)


def test_a_home_that_vanished_is_a_clear_error(data_dir: Path, elsewhere: Path) -> None:
    data_dir.mkdir()
    (data_dir / "postgres").symlink_to(elsewhere / "clusters" / "gone" / "postgres")
    with pytest.raises(StackError, match="which is gone, and the database with it"):
        reachable_home(STRANGER, data_dir / "postgres")


def test_a_closed_data_directory_works(data_dir: Path, elsewhere: Path) -> None:
    data_dir.parent.chmod(0o700)
    outside = data_dir.parent.parent / f"{data_dir.parent.name}-elsewhere"
    accounts.ELSEWHERE = outside
    try:
        with embedded(data_dir, durable=False) as settings:
            postgres = identities(data_dir)["postgres"].process()
            assert postgres is not None
            assert postgres.uids().effective != 0
            with psycopg.connect(settings.database_url.get_secret_value()) as connection:
                connection.execute("CREATE TABLE kept ()")
        with (
            embedded(data_dir, durable=False) as settings,
            psycopg.connect(settings.database_url.get_secret_value()) as connection,
        ):
            connection.execute("TABLE kept")
        assert data_dir.parent.stat().st_mode & 0o777 == 0o700
        if account_for(data_dir / "postgres") is not None:
            assert (data_dir / "postgres").is_symlink()
            assert (data_dir / "postgres").readlink().is_relative_to(outside)
            (data_dir / "postgres").unlink()
            accounts._forget_abandoned()
            assert list((outside / "clusters").iterdir()) == []
    finally:
        shutil.rmtree(outside, ignore_errors=True)
