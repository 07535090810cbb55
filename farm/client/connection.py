"""Which farm to talk to: an address and an API key, from arguments, the environment or a data directory."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import orjson

from farm.errors import InvalidRequest, Unavailable

CREDENTIALS = "credentials.json"
"""The file in a data directory that `farm up` writes (mode 600)."""


@dataclass(frozen=True)
class Connection:
    """Address (`http://host:port`, no trailing slash) and API key of a farm. The key stays out of `repr`."""

    url: str
    api_key: str | None = field(repr=False)


def resolve(url: str | None, api_key: str | None, data_dir: Path | str) -> Connection:
    """The farm that arguments, else `FARM_URL` and `FARM_API_KEY`, else `<data_dir>/credentials.json` name.

    The file's key belongs to the file's address: it is never sent to an address that came from elsewhere.
    Raises Unavailable when nothing names a farm, InvalidRequest when what names it makes no sense.
    """
    url = url or os.environ.get("FARM_URL")
    api_key = api_key or os.environ.get("FARM_API_KEY")
    if not url:
        stored = _credentials(Path(data_dir) / CREDENTIALS)
        url, api_key = stored["url"], api_key or stored["api_key"]
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise InvalidRequest(f"{url!r} is not the address of a farm; give one like http://127.0.0.1:8000")
    return Connection(url.rstrip("/"), api_key)


def _credentials(path: Path) -> dict[str, str]:
    try:
        stored = orjson.loads(path.read_bytes())
        return {"url": str(stored["url"]), "api_key": str(stored["api_key"])}
    except FileNotFoundError:
        raise Unavailable(
            f"no farm is known here: {path} does not exist. Start one with `farm up`, "
            "or set FARM_URL and FARM_API_KEY, or name another --data-dir"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} cannot be read as credentials: {error}") from error
