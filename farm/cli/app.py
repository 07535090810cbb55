"""The commands of `farm`, in the order in which its help lists them."""

import typer

from farm.cli import batches, demo, programs, render, replay, stack, submit
from farm.cli.exits import FarmGroup
from farm.cli.keys import keys
from farm.cli.models import models
from farm.cli.projects import projects
from farm.cli.train import train
from farm.cli.uploads import upload, uploads
from farm.cli.webhooks import webhooks

app = typer.Typer(
    cls=FarmGroup,
    name="farm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback with local variables would show keys
    help="Render pictures on a farm of LCM-LoRA workers.\n\n"
    "Commands find their farm by FARM_URL and FARM_API_KEY, else in the data directory (--data-dir, FARM_DATA_DIR)."
    "\n\nExit codes: 0 done; 1 something failed, a job for instance; 2 wrong usage or bad input; 3 not found; "
    "4 the farm or a server behind it cannot be reached; 5 no valid key; 130 interrupted.",
)

SECTIONS = {
    "First steps": (demo.demo, render.render),
    "The farm of this machine": (stack.up, stack.down, stack.status),
    "Jobs and batches": (
        submit.submit,
        upload,
        batches.watch,
        batches.download,
        batches.jobs,
        batches.batches,
        batches.cancel,
        batches.pause,
        batches.resume,
        batches.retry,
        replay.replay,
        batches.priority,
        batches.delete,
    ),
    "The parts one by one": (
        programs.api,
        programs.worker,
        programs.sweeper,
        programs.flower,
        programs.migrate,
        programs.version,
    ),
}

for section, commands in SECTIONS.items():
    for command in commands:
        app.command(rich_help_panel=section)(command)
    if section == "Jobs and batches":
        app.add_typer(uploads, name="uploads", rich_help_panel="Models and keys")
        app.add_typer(models, name="models", rich_help_panel="Models and keys")
        app.add_typer(keys, name="keys", rich_help_panel="Models and keys")
        app.add_typer(projects, name="projects", rich_help_panel="Models and keys")
        app.add_typer(webhooks, name="webhooks", rich_help_panel="Models and keys")
        app.add_typer(train, name="train", rich_help_panel="Models and keys")
