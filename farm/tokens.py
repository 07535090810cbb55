"""Counting prompt tokens as CLIP does, without torch."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

# CLIP's own splitting rule (openai/CLIP, simple_tokenizer.py).
CLIP_PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

CLIP_MERGES = Path(__file__).parent / "assets" / "families" / "clip-merges.txt"

UNKNOWN = "<|endoftext|>"
"""CLIP uses its end mark for what it does not know; byte-level pieces leave nothing unknown."""

REMEMBERED = 1_024
"""Prompts whose count is kept. A prompt may take 32 KB, so this many are no burden."""

_loaded: dict[str, Tokenizer] = {}
"""Tokenizers by checkpoint hash; content never changes under a hash."""


class TokenCounter:
    """Counts tokens of prompts for checkpoints given by hash. Fetches a tokenizer when it is first needed.

    `keys` gives, for each checkpoint hash, the object key of each of its tokenizer files by path.
    """

    def __init__(self, keys: Mapping[str, Mapping[str, str]], fetch: Callable[[str], bytes]) -> None:
        self._keys = keys
        self._fetch = fetch
        self._count = lru_cache(maxsize=REMEMBERED)(self._uncached)

    def count(self, checkpoint: str, prompt: str) -> int | None:
        """Tokens of a prompt without start and end marks; None when the checkpoint has no tokenizer."""
        return self._count(checkpoint, prompt)

    def _uncached(self, checkpoint: str, prompt: str) -> int | None:
        tokenizer = _loaded.get(checkpoint) or self._load(checkpoint)
        return None if tokenizer is None else len(tokenizer.encode(prompt, add_special_tokens=False).ids)

    def _load(self, checkpoint: str) -> Tokenizer | None:
        keys = self._keys.get(checkpoint, {})
        if "tokenizer/vocab.json" in keys and "tokenizer/merges.txt" in keys:
            vocab = json.loads(self._fetch(keys["tokenizer/vocab.json"]))
            tokenizer = clip_tokenizer(vocab, self._fetch(keys["tokenizer/merges.txt"]).decode())
        elif "tokenizer/tokenizer.json" in keys:
            tokenizer = Tokenizer.from_str(self._fetch(keys["tokenizer/tokenizer.json"]).decode())
        else:
            return None
        tokenizer.no_truncation()
        _loaded[checkpoint] = tokenizer
        return tokenizer


def clip_vocabulary() -> tuple[dict[str, int], str]:
    """OpenAI CLIP's vocabulary and merges, which SD 1.5, SDXL and SSD-1B use: `vocab.json` (decoded), `merges.txt`.

    The vocabulary follows from the merges as in openai/CLIP, simple_tokenizer.py: bytes, bytes at a word's end, merged
    pairs in order, start and end mark.
    """
    merges = CLIP_MERGES.read_text("utf-8")
    bytes_ = list(_byte_letters())
    pairs = ["".join(line.split()) for line in merges.splitlines()[1:]]
    words = [*bytes_, *(letter + "</w>" for letter in bytes_), *pairs, "<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, merges


def _byte_letters() -> Iterator[str]:
    """A printable letter for each of the 256 bytes, in the order that OpenAI's byte-level vocabularies begin with."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    yield from (chr(256 + number) for number in range(256 - len(printable)))


def clip_tokenizer(vocab: dict[str, int], merges: str) -> Tokenizer:
    """CLIP's byte-level BPE from its two files: `vocab.json` (decoded) and `merges.txt` (text)."""
    lines = [line for line in merges.splitlines() if line and not line.startswith("#")]
    pairs = [(left, right) for left, right in (line.split(" ", 1) for line in lines)]
    model = models.BPE(vocab, pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
