"""`farm demo`: the first impression. Four sentences through the whole farm, and a contact sheet."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.batches import explain_failures
from farm.cli.display import Bar, json_line, seconds, table, waiting
from farm.cli.exits import Exit
from farm.cli.local import Occasion, own_farm
from farm.cli.options import DATA_DIR, AsJson, DataDir
from farm.cli.saying import say

if TYPE_CHECKING:
    from farm.client import Saved
    from farm.views import BatchView

SENTENCES = (
    ("A single split crack on a concrete wall", 1),
    ("Sunlight shining on an outdoor concrete wall with split cracks", 2),
    ("Vertically split cracks on an old yellow painted concrete wall", 3),
    ("Water draining down next to a cracked concrete wall", 4),
)
"""What the demo renders, with the seeds it uses: the same pictures each time."""
SHEET = "contact-sheet.png"


@dataclass
class Stages:
    """How long each part of the demo took, in seconds."""

    took: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.took[name] = self.took.get(name, 0.0) + time.monotonic() - started


def demo(
    data_dir: DataDir = DATA_DIR,
    out: Annotated[Path, typer.Option(help="Where the pictures go.", metavar="DIR", file_okay=False)] = Path(
        "demo-out"
    ),
    as_json: AsJson = False,
) -> None:
    """Start a farm of its own, render four sentences through API and queue, write pictures and a contact sheet."""
    from PIL import Image

    from farm.cli.contact_sheet import draw

    stages = Stages()
    begun = time.monotonic()
    with own_farm(data_dir / "demo", stages.stage) as occasion:
        done, saved = _render(occasion, out, stages)
        styles = [one.name for one in occasion.farm.adapters() if one.kind == "style"]
    sheet = out / SHEET
    with stages.stage("draw the contact sheet"), waiting("drawing the contact sheet"):
        draw([(Image.open(each.path), each.job.prompt) for each in saved]).save(sheet)
    stages.took["all together"] = time.monotonic() - begun
    if as_json:
        pictures = [{"path": str(each.path), "prompt": each.job.prompt} for each in saved]
        json_line({"pictures": pictures, "contact_sheet": str(sheet), "seconds": stages.took})
    else:
        _tell(saved, sheet, stages, styles)
    if done.counts.succeeded < done.total:
        raise typer.Exit(Exit.FAILED)


def _render(occasion: Occasion, out: Path, stages: Stages) -> "tuple[BatchView, list[Saved]]":
    farm = occasion.farm
    with stages.stage("submit four jobs through the API"):
        batch = farm.submit_many([{"prompt": prompt, "seed": seed} for prompt, seed in SENTENCES], name="demo")
    with stages.stage("load the model and render (4 steps with LCM-LoRA)"), Bar("rendering", batch.total) as bar:
        done = occasion.wait(batch, bar.show)
    explain_failures(farm, done)
    saved: list[Saved] = []
    with stages.stage("download from S3"), Bar("downloading", done.counts.succeeded) as bar:

        def note(one: "Saved", number: int) -> None:
            saved.append(one)
            bar.update(number)

        farm.download(done, out, note)
    return done, saved


def _tell(saved: "list[Saved]", sheet: Path, stages: Stages, styles: list[str]) -> None:
    say("")
    for each in saved:
        say(f"{each.path}  {each.job.prompt}")
    say(f"{sheet}  all of them with their prompts")
    table(("STAGE", "#TOOK"), ((name, seconds(took)) for name, took in stages.took.items()), "")
    say("How to go on:")
    say("  farm up                          a farm that keeps running, until Ctrl-C")
    say('  farm render "A wet brick wall"   one picture more')
    for name in styles:
        say(f'  farm render "A wet brick wall" --adapter {name}:0.8   the same in the style of {name}')
    say("  farm submit jobs.csv --watch     many; farm --help has the rest")
