"""What the command line writes to a terminal, without what would command that terminal.

Prompts, names, labels, reasons and answers of servers come from people whom the reader need not trust. A control
character in them could set the window's title or the colour of all that follows, or hide text; a bidi character could
show it in another order than it stands. Every line for people goes through `say`, or as a cell through a table.
"""

import re

import typer

COMMANDING = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1: ESC, and U+009B, which is ESC [ in one
    "\u061c\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"  # bidi marks, embeddings, overrides, isolates; invisible ones
    "\u2028\u2029\ud800-\udfff]"  # line ends of another kind; halves of characters, which no terminal can be sent
)


def visible(text: str) -> str:
    r"""The text with every character that commands a terminal written out.

    >>> print(visible("a \x1b[31mred\u202e wall\n"))
    a \x1b[31mred\u202e wall\n
    """
    return COMMANDING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def visible_json(document: bytes) -> bytes:
    r"""A JSON document that means the same, with those characters as JSON writes them; orjson does so with few.

    >>> visible_json('{"name": "\x9b2J\u202e"}'.encode())
    b'{"name": "\\u009b2J\\u202e"}'
    """
    return COMMANDING.sub(lambda found: f"\\u{ord(found[0]):04x}", document.decode()).encode()


def say(text: object, *, fg: str | None = None, err: bool = False, lines: bool = False) -> None:
    """Write one line, or, with `lines`, those of a text that is ours."""
    told = str(text)
    typer.secho("\n".join(map(visible, told.split("\n"))) if lines else visible(told), fg=fg, err=err)
