"""docs/models.md says what every refusal of a model means: each message in the code has its row."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from farm.fields import problems_of
from farm.jobspec import JobSpec

ROOT = Path(__file__).parents[2]
PLACES = ("farm", "workers/pipelines", "workers/registering", "workers/sources.py", "workers/modelstore.py")
GAP = "…"
OWN_WORDS = 8
"""Letters below which a message only passes on what another one says."""


Function = ast.FunctionDef | ast.AsyncFunctionDef


def messages(tree: ast.AST) -> Iterator[str]:
    """What each `InvalidModel(...)` says, with a gap for whatever it fills in, and what fills such gaps: words of its
    own function, arguments of those that pass a reason on, tables of refusals, and answers to why something is not
    taken."""
    passing: dict[str, list[int]] = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        parameters = [argument.arg for argument in function.args.args]
        for said in said_by(function):
            yield spoken(said)
            gaps = {part.value.id for part in ast.walk(said) if filled_by_name(part)}  # type: ignore[attr-defined]
            passing.setdefault(function.name, []).extend(map(parameters.index, gaps.intersection(parameters)))
            yield from (spoken(value) for name, value in assigned(function) if name in gaps)
        if function.returns is not None and ast.unparse(function.returns) == "str | None":
            answers = (node.value for node in ast.walk(function) if isinstance(node, ast.Return))
            yield from (spoken(answer) for answer in answers if is_text(answer))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (numbers := passing.get(ast.unparse(node.func).rpartition(".")[2])):
            given = (node.args[number] for number in numbers if number < len(node.args))
            yield from (spoken(text) for text in given if is_text(text))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REFUSED":
            yield from (spoken(row.elts[1]) for row in ast.walk(node.value) if is_pair(row))  # type: ignore[attr-defined]


def said_by(function: ast.AST) -> list[ast.expr]:
    """The first argument of every refusal in a function."""
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call) and node.args)
    return [call.args[0] for call in calls if ast.unparse(call.func).endswith("InvalidModel")]


def assigned(function: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Texts that a function gives a name."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and is_text(node.value):
            yield ast.unparse(node.targets[0]), node.value


def filled_by_name(part: ast.AST) -> bool:
    return isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name)


def is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_pair(node: ast.AST) -> bool:
    return isinstance(node, ast.Tuple) and len(node.elts) == 2 and is_text(node.elts[1])


def spoken(text: ast.expr) -> str:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in parts)


def every_message() -> set[str]:
    """Those with words of their own; a name or a key alone is none."""
    roots = [ROOT / place for place in PLACES]
    files = [file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py"))]
    texts = [text for file in files if "InvalidModel" in (text := file.read_text("utf-8"))]
    found = {message for text in texts for message in messages(ast.parse(text))}
    return {one for one in found if sum(map(str.isalpha, one)) >= OWN_WORDS and " " in one.strip()}


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
    assert len(said) > 110
    assert {"this is for another model family", "the SDXL refiner is not supported", "is missing from the file"} < said
    assert [one for one in sorted(said) if not any(all(piece in one for piece in row) for row in rows)] == []


def test_the_limits_of_a_jobs_adapters_stand_there_with_what_is_said_beyond_them() -> None:
    told = (ROOT / "docs/models.md").read_text("utf-8").split("## Adapters of a job")[1]
    for uses in ([{"name": "a"}] * 17, [{"name": "a", "weight": 10.5}], [{"name": "a", "weight": -10.5}]):
        with pytest.raises(ValidationError) as caught:
            JobSpec.model_validate({"prompt": "x", "adapters": uses})
        (problem,) = problems_of(caught.value)
        assert f"`{problem['field']}`" in told
        assert problem["problem"].removeprefix("Input should be ") in told
    JobSpec.model_validate({"prompt": "x", "adapters": [{"name": "a", "weight": w} for w in (-10, 10, *[0.5] * 14)]})
