"""The command line: `farm`. Each file holds the commands of one errand; `app.py` puts them together.

Exit codes: 0 done; 1 something failed, a job for instance; 2 wrong usage or bad input; 3 not found; 4 the farm or a
server behind it cannot be reached; 5 no valid key, or one without the scope; 130 interrupted.

Commands import what they need when they run, so that `farm --help` answers at once and a producer needs no torch.
"""


def main() -> None:
    """Run the command line and exit."""
    from farm.cli.app import app

    app()
