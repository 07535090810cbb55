"""WebDataset shards: tar files whose members share a name up to the first dot, such as 000017.jpg and 000017.txt.

Read by number and in place, where the webdataset library streams: a run that resumes must find its place without
reading everything before it.
"""

from __future__ import annotations

import glob
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from workers.training.errors import TrainingError, why
from workers.training.folders import ENDINGS, Captions, captions_of, from_json

LONGEST = 1 << 20
"""Bytes of a caption member."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture inside a shard: `size` bytes from `offset`."""

    shard: Path
    name: str
    offset: int
    size: int
    captions: Captions

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def files(said: str) -> list[Path]:
    """The shards that a folder, a file, a glob or a range names; none when it names something else.

    Raises TrainingError when a shard of a range is missing, or a shard is compressed.
    """
    path = Path(said)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        packed = sorted(path.glob("*.tar.gz")) + sorted(path.glob("*.tgz"))
    elif _RANGE.search(said):
        found, packed = [Path(each) for each in expand(said)], []
        if missing := [str(each) for each in found if not each.is_file()]:
            raise TrainingError(f"--data {said}: {len(missing)} of {len(found)} shards are missing, first {missing[0]}")
    else:
        found = [path] if path.is_file() else sorted(map(Path, glob.glob(said)))  # noqa: PTH207 (absolute patterns)
        packed = []
    packed += [each for each in found if each.suffix != ".tar" and each.is_file()]
    if packed:
        raise TrainingError(f"{packed[0]}: shards are plain .tar files (compressed ones cannot be read in place)")
    return found


def expand(pattern: str) -> list[str]:
    """Shell ranges of numbers.

    >>> expand("a-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1))
    return [head + number + rest for number in numbers for rest in expand(tail)]


def index(path: Path, column: str) -> list[Sample]:
    """Every picture of a shard with its caption, from a .txt member or the `column` of a .json member.

    Raises TrainingError when the tar cannot be read or is cut short, and when a .json member cannot be read.
    """
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, Captions] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, dot, ending = base.partition(".")
                if not member.isreg() or not dot:
                    continue
                key = f"{folder}/{key}"
                if f".{ending.lower()}" in ENDINGS:
                    pictures[key] = member
                elif ending == "txt" or (ending == "json" and key not in captions):
                    captions[key] = _caption(tar, member, column, f"{path}:{member.name}")
    except (tarfile.TarError, EOFError) as error:
        raise TrainingError(f"{path} cannot be read as a tar file: {error}") from error
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {why(error)}") from error
    return [
        Sample(path, member.name, member.offset_data, member.size, captions.get(key, ()))
        for key, member in pictures.items()
    ]


def _caption(tar: tarfile.TarFile, member: tarfile.TarInfo, column: str, where: str) -> Captions:
    """The .txt counts before the .json; a .json without the column says nothing."""
    if member.size > LONGEST:
        raise TrainingError(f"{where}: {member.size} bytes are no caption")
    file = tar.extractfile(member)
    raw = file.read() if file else b""
    if member.name.endswith(".txt"):
        try:
            return (raw.decode().strip(),)
        except UnicodeDecodeError as error:
            raise TrainingError(f"{where} cannot be read: {error}") from error
    row = from_json(raw, where)
    return captions_of(row[column], where) if isinstance(row, dict) and column in row else ()
