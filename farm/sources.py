"""Where a model comes from, as a person writes it: a local path, an S3 prefix, or a Hugging Face hub repository."""

import re
from dataclasses import dataclass
from typing import Literal

HUB = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+))?",
    re.ASCII,
)
S3 = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<path>.+)")
ADDRESS = re.compile(r"[0-9]+(?:\.[0-9]+){3}")
"""What no bucket may be called, by the rules of S3."""
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed source. `place` is the repository or the bucket; `path` what is below it, empty for all.

    A path that ends in `.safetensors` names one file, every other one a folder.
    """

    kind: Literal["hub", "s3", "local"]
    text: str
    place: str = ""
    path: str = ""
    revision: str | None = None

    @property
    def is_file(self) -> bool:
        return self.path.endswith(".safetensors")


def parse(text: str) -> Source:
    """A remote source: `hf:owner/name@<commit>[/folder or file]` or `s3://bucket/prefix or key`.

    Raises ValueError, saying what would be right. A branch or tag is no revision: it can change under its name.
    """
    if text.startswith("hf:"):
        found = HUB.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no hub source; write hf:owner/name@<40 hex digits of a commit>")
        revision = found["revision"] or ""
        if not COMMIT.fullmatch(revision):
            said = f"{revision!r} is no commit" if revision else "the revision is missing"
            raise ValueError(f"{text!r}: {said}; pin it: hf:{found['repo']}@<40 hex digits>, never a branch or a tag")
        return Source("hub", text, found["repo"], _inside(text, found["path"] or ""), revision)
    if text.startswith("s3://"):
        match = S3.fullmatch(text)
        if match is None or ".." in match["bucket"] or ADDRESS.fullmatch(match["bucket"]):
            raise ValueError(f"{text!r} is no S3 source; write s3://bucket/prefix")
        return Source("s3", text, match["bucket"], _inside(text, match["path"]))
    raise ValueError(f"{text!r} is no source; write hf:owner/name@<commit> or s3://bucket/prefix")


def _inside(text: str, path: str) -> str:
    cleaned = path.strip("/")
    if any(part in {"", ".", ".."} for part in cleaned.split("/")) and cleaned:
        raise ValueError(f"{text!r}: the path may not hold empty parts, . or ..")
    if "\0" in cleaned:
        raise ValueError(f"{text!r}: the path may not hold the character U+0000")
    return cleaned
