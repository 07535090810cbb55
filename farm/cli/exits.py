"""How a command ends: its exit code, and what a person reads when it failed."""

from enum import IntEnum
from typing import Any

import typer
from typer.core import TyperGroup

from farm.cli.saying import say
from farm.errors import (
    FarmError,
    Forbidden,
    InvalidModel,
    InvalidRequest,
    NotFound,
    StackError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedMedia,
)

MOST_PROBLEMS = 20
"""Lines of a refused submission that are shown; `--json` shows all that the farm named."""


class Exit(IntEnum):
    """The exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    AUTH = 5
    INTERRUPTED = 130


MEANING: tuple[tuple[tuple[type[FarmError], ...], Exit], ...] = (
    ((InvalidRequest, InvalidModel, TooLarge, UnsupportedMedia), Exit.USAGE),
    ((NotFound,), Exit.NOT_FOUND),
    ((Unavailable,), Exit.UNREACHABLE),
    ((Unauthorized, Forbidden), Exit.AUTH),
)


def exit_code(error: FarmError) -> Exit:
    """The exit code an error stands for."""
    return next((code for kinds, code in MEANING if isinstance(error, kinds)), Exit.FAILED)


def report(error: FarmError) -> None:
    """Say on standard error what went wrong, problem by problem."""
    # Only what became of our own servers has several lines: the end of their logs.
    say(f"farm: {error.message}", fg="red", err=True, lines=isinstance(error, StackError))
    problems = error.problems if isinstance(error, InvalidRequest) else []
    for problem in problems[:MOST_PROBLEMS]:
        place = f"line {problem['line']}" if "line" in problem else ""
        where = ": ".join(part for part in (place, problem.get("field", "")) if part)
        say(f"  {where}: {problem.get('problem', '')}" if where else f"  {problem.get('problem', '')}", err=True)
    if len(problems) > MOST_PROBLEMS:
        say(f"  and {len(problems) - MOST_PROBLEMS} more", err=True)


class FarmGroup(TyperGroup):
    """The root of the command line: turns what commands raise into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FarmError as error:
            report(error)
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt:
            say("farm: interrupted", err=True)
            raise typer.Exit(Exit.INTERRUPTED) from None
        except TimeoutError as error:
            say(f"farm: {error}", fg="red", err=True)
            raise typer.Exit(Exit.FAILED) from error
        except OSError as error:
            if error.filename is None:  # no file of the caller's: a broken pipe, say, which typer knows how to end
                raise
            say(f"farm: {error.filename}: {error.strerror}", fg="red", err=True)
            refused = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError)
            raise typer.Exit(Exit.USAGE if refused else Exit.FAILED) from error
