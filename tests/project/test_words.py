"""What must not stand in the project: unfinished work, switched-off tests, somebody's machine, endless files."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("farm", "workers", "api", "migrations", "tests", "benchmarks", "docs", "requirements", ".ci")
LONGEST = 400
"""Lines. Most files have half of that; tables, and what a migration created, may be longer."""
WRITTEN = ("benchmarks/out",)
"""Made by programs: not there in a fresh clone."""
# Written with brackets so that this file does not find itself.
UNFINISHED = r"\b(?:TO[D]O|FIX[M]E|X[X]X|NotImplemented[E]rror)\b"
SWITCHED_OFF = r"pytest\.(?:mark\.)?(?:s[k]ip|x[f]ail)|\bassert [T]rue\b|[p]ragma: no cover|unittest\.s[k]ip"
SOMEBODYS_MACHINE = r"(?<![\w.])/(?:work|Users|workspace|builds)/\w|/home/(?!\.)\w+/|(?<![\w.~])/root/\w"
REGISTRIES = r"(?:pyth[o]nhosted|p[y]pi|registry\.n[p]mjs|deb\.d[e]bian)\.org|--(?:extra-)?index-[u]rl"
SECRETS = r"-----BEGIN [A-Z ]*PRIVATE K[E]Y|AKIA[0-9A-Z]{16}"


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project, by its path."""
    paths = [path for path in ROOT.iterdir() if path.is_file() and path.name not in {".env", ".git"}]
    for folder in FOLDERS:
        paths += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    written = tuple(str(ROOT / folder) for folder in WRITTEN)
    paths = [path for path in paths if not str(path).startswith(written)]
    for path in paths:
        data = path.read_bytes() if path.stat().st_size < 1_000_000 else b"\0"
        if b"\0" not in data:
            yield str(path.relative_to(ROOT)), data.decode()


@pytest.mark.parametrize(
    "pattern", [UNFINISHED, SWITCHED_OFF, SOMEBODYS_MACHINE, REGISTRIES, SECRETS], ids=lambda pattern: pattern[:20]
)
def test_it_stands_nowhere(pattern: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, "\n".join(found)


def test_no_file_is_too_long_to_read() -> None:
    long = {name: len(text.splitlines()) for name, text in texts() if name.endswith(".py")}
    assert not {name: lines for name, lines in long.items() if lines > LONGEST}


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{name}: {target}"
        for name, text in texts()
        if name.endswith(".md")
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
        if not ((ROOT / name).parent / target).exists()
    ]
    assert not broken


def test_paths_that_documents_name_exist() -> None:
    """Code moves; a document that names a file which is gone sends people astray."""
    named = re.compile(r"`((?:farm|workers|api|tests|migrations|benchmarks)/[\w/.-]*)`")
    gone = [
        f"{name}: {path}"
        for name, text in texts()
        if name.endswith(".md")
        for path in named.findall(text)
        if not path.startswith(WRITTEN) and not (ROOT / path).exists()
    ]
    assert not gone
