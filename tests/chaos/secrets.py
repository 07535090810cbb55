"""Secrets of a run are canaries: random words that must not stand in a log, a history, an answer, a picture, a message
to a webhook, or on the broker."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from farm.settings import Settings
from farm.stack import Servers
from tests.chaos.invariants import Violation

LEAST_LETTERS = 12
"""Shorter words would be found by chance."""


def of(settings: Settings, **more: str) -> dict[str, str]:
    """The secrets of a farm by name, and those that it made."""
    assert settings.s3_secret_access_key is not None
    found = {
        "the database's password": unquote(urlsplit(settings.database_url.get_secret_value()).password or ""),
        "the broker's password": unquote(urlsplit(settings.redis_url.get_secret_value()).password or ""),
        "the store's secret key": settings.s3_secret_access_key.get_secret_value(),
        **more,
    }
    short = [name for name, word in found.items() if len(word) < LEAST_LETTERS]
    assert not short, f"too short to look for: {short}"
    return found


def in_files(folder: Path, servers: Servers, secrets: Mapping[str, str]) -> list[Violation]:
    """Logs of every process and the history, as they lie in `folder`, and the servers' own logs."""
    files = [*folder.glob("*.log"), *folder.glob("*.ndjson"), *_logs_of(servers)]
    return [
        Violation("secret", f"{name} stands in {file.name}")
        for file in sorted(files)
        for name in named_in(file.read_bytes(), secrets)
    ]


def _logs_of(servers: Servers) -> list[Path]:
    """What PostgreSQL (initdb too), the broker and S3 logged, also before a log was set aside."""
    folders = {service.program.log.parent for service in servers.services}
    found = [file for folder in folders for file in folder.glob("*.log*")]
    missing = {service.program.log for service in servers.services} - set(found)
    assert not missing, f"no log to search: {missing}"
    return found


def named_in(data: bytes, secrets: Mapping[str, str]) -> Iterator[str]:
    """The names of the secrets that stand in `data`."""
    return (name for name, word in secrets.items() if word.encode() in data)
