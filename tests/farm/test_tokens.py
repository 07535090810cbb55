"""Prompt tokens are counted as the shipped model's own tokenizer counts them."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from farm.catalogue import ASSETS
from farm.tokens import TokenCounter, clip_tokenizer

FOLDER = ASSETS / "tokenizer"
PROMPTS = [
    "A single split crack on a concrete wall",
    "Water draining down next to a cracked concrete wall",
    "  Zürich's  WALL, 3 cracks: don't!  ",
    "x" * 300,
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_two_files_and_the_one_file_agree(prompt: str) -> None:
    one = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    one.no_truncation()
    one.no_padding()
    two = clip_tokenizer(json.loads((FOLDER / "vocab.json").read_text()), (FOLDER / "merges.txt").read_text())
    assert two.encode(prompt, add_special_tokens=False).ids == one.encode(prompt, add_special_tokens=False).ids


def test_a_counter_fetches_a_tokenizer_once() -> None:
    fetched: list[str] = []

    def fetch(key: str) -> bytes:
        fetched.append(key)
        return (FOLDER / Path(key).name).read_bytes()

    keys = {"c0ffee": {"tokenizer/vocab.json": "k/vocab.json", "tokenizer/merges.txt": "k/merges.txt"}}
    counter = TokenCounter(keys, fetch)
    assert counter.count("c0ffee", PROMPTS[0]) == counter.count("c0ffee", PROMPTS[0])
    assert counter.count("c0ffee", "crack " * 80) == 80 * (counter.count("c0ffee", "crack") or 0)
    assert sorted(fetched) == ["k/merges.txt", "k/vocab.json"]
    assert counter.count("unknown", "x") is None
