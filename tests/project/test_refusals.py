"""docs/models.md says what every refusal of a model means: each message in the code has its row."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = ("farm", "workers/pipelines", "workers/registering", "workers/sources.py", "workers/modelstore.py")
GAP = "…"
OWN_WORDS = 8
"""Letters below which a message only passes on what another one says."""


def messages(tree: ast.AST) -> Iterator[str]:
    """What each `InvalidModel(...)` says, with a gap for whatever it fills in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("InvalidModel") and node.args:
            said = node.args[0]
            parts = said.values if isinstance(said, ast.JoinedStr) else [said]
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in parts)


def every_message() -> set[str]:
    roots = [ROOT / place for place in PLACES]
    files = [file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py"))]
    found = {message for file in files for message in messages(ast.parse(file.read_text("utf-8")))}
    return {one for one in found if sum(map(str.isalpha, one)) >= OWN_WORDS}


def explained() -> list[list[str]]:
    """The phrases of the table, each as the pieces between what is filled in."""
    text = (ROOT / "docs/models.md").read_text("utf-8").split("## What every refusal means")[1]
    phrases = [
        phrase for row in re.findall(r"^\| (.+?) \|", text, re.MULTILINE) for phrase in re.findall(r"`(.+?)`", row)
    ]
    return [
        [piece.strip() for piece in re.split(r"…|\bN\b|\bA\b|\bB\b", phrase) if piece.strip()] for phrase in phrases
    ]


def test_every_refusal_has_its_row() -> None:
    said, rows = every_message(), explained()
    assert len(said) > 60
    assert [one for one in sorted(said) if not any(all(piece in one for piece in row) for row in rows)] == []
