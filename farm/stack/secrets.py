"""The secrets of one data directory: drawn once, kept in `secrets.json` with mode 600."""

import json
import os
import secrets as randomness
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from farm.errors import StackError


def _draw() -> str:
    return randomness.token_hex(24)


@dataclass(frozen=True)
class Secrets:
    """Passwords and keys of the embedded servers: 192 random bits each, in hexadecimal."""

    postgres_password: str = field(default_factory=_draw, repr=False)
    valkey_password: str = field(default_factory=_draw, repr=False)
    s3_access_key: str = field(default_factory=_draw, repr=False)
    s3_secret_key: str = field(default_factory=_draw, repr=False)
    s3_inner_key: str = field(default_factory=_draw, repr=False)
    """Signs what SeaweedFS's own parts say to each other; without it anyone on this machine could delete objects."""
    s3_admin_password: str = field(default_factory=_draw, repr=False)
    flower_password: str = field(default_factory=_draw, repr=False)


def write_private(file: Path, content: bytes) -> None:
    """Write a file only we can read (mode 600), all or nothing: a reader sees the old or the new content."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(stream.fileno(), 0o600)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


def write_private_json(file: Path, content: Any) -> None:
    write_private(file, json.dumps(content, indent=2).encode() + b"\n")


def load_secrets(file: Path, *, needed_by: Path) -> Secrets:
    """The secrets in `file`; made on first use. `needed_by` is the cluster that was initialised with them.

    Raises StackError if the file is damaged, or gone while the cluster still wants its password.
    """
    if not file.exists():
        if needed_by.exists():
            raise StackError(
                f"{file} is gone, but the database in {needed_by} still has its password; restore the file, "
                "or start anew in another data directory"
            )
        fresh = Secrets()
        write_private_json(file, asdict(fresh))
        return fresh
    try:
        stored = json.loads(file.read_text())
        known = Secrets(**{each.name: str(stored[each.name]) for each in fields(Secrets) if each.name in stored})
    except (ValueError, TypeError) as error:
        raise StackError(f"{file} is damaged ({error}); restore it from a copy") from error
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)
    if asdict(known) != stored:  # a later release knows more secrets than the one that wrote the file
        write_private_json(file, asdict(known))
    return known
