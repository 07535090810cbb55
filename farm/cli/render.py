"""`farm render`: one prompt, pictures on disk."""

import re
from itertools import chain
from itertools import count as numbers
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.batches import explain_failures
from farm.cli.display import Bar, json_line
from farm.cli.exits import Exit
from farm.cli.local import Occasion, some_farm
from farm.cli.options import DATA_DIR, Adapters, AsJson, Controls, DataDir, adapters_of, controls_of, size_of
from farm.cli.saying import say
from farm.cli.uploads import send
from farm.errors import InvalidRequest
from farm.formats import KINDS, Format, format_of
from farm.states import JobState
from farm.views import BatchView, JobView

if TYPE_CHECKING:
    from farm.client import Farm

HASH = re.compile(r"[0-9a-f]{64}")
NAMES: dict[Format, str] = {"png": "PNG", "webp": "WebP", "jpeg": "JPEG"}


def render(
    prompt: Annotated[str, typer.Argument(help="What to draw.", metavar="PROMPT", show_default=False)],
    data_dir: DataDir = DATA_DIR,
    count: Annotated[int, typer.Option(help="So many pictures, seeds counting up.", min=1)] = 1,
    seed: Annotated[int | None, typer.Option(help="Drawn if absent.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default=False)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="In pixels.", metavar="WxH", show_default=False)] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.", show_default=False)] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Base weights by name.", show_default=False)] = None,
    adapter: Adapters = None,
    acceleration: Annotated[str | None, typer.Option(help="lcm-lora or none.", show_default=False)] = None,
    vae: Annotated[str | None, typer.Option(help="A VAE by name, tiny, or own.", show_default=False)] = None,
    scheduler: Annotated[str | None, typer.Option(help="lcm, ddim, ...", show_default=False)] = None,
    image: Annotated[
        str | None, typer.Option(help="A picture to start from.", metavar="PICTURE", show_default=False)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of it is drawn anew, 0 to 1.", show_default=False)
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Where: white is drawn anew.", metavar="PICTURE", show_default=False)
    ] = None,
    control: Controls = None,
    motion: Annotated[str | None, typer.Option(help="A motion adapter: an animation.", show_default=False)] = None,
    frames: Annotated[int | None, typer.Option(help="So many of them; 16 if absent.", show_default=False)] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second; 8 if absent.", show_default=False)] = None,
    stored_as: Annotated[
        str | None, typer.Option("--format", help="png, webp or jpeg; png if absent.", show_default=False)
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="1 to 100, of a jpeg, or a webp that may lose pixels.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="A file that ends as its format, or a folder.", metavar="PATH")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Render a prompt now and write the pictures here.

    Uses the farm that runs, or starts one for the occasion. Ctrl-C cancels what was submitted. Prints the paths. A
    PICTURE is a file, which is sent first, or the hash of an upload.
    """
    wanted = {
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative,
        "checkpoint": checkpoint,
        "adapters": adapters_of(adapter) or None,
        "acceleration": acceleration,
        "vae": vae,
        "scheduler": scheduler,
        "image": image,
        "strength": strength,
        "mask": mask,
        "controls": controls_of(control) or None,
        "motion": motion,
        "frames": frames,
        "fps": fps,
        "format": stored_as,
        "quality": quality,
        **size_of(size),
    }
    fields = {name: value for name, value in wanted.items() if value is not None}
    folder, stem = place(out, prompt, count, _known(stored_as, motion))
    with some_farm(data_dir) as occasion:
        batch = _submit(occasion.farm, prompt, count, _sent(occasion.farm, fields))
        with Bar("rendering", count) as bar:
            done = _wait_or_cancel(occasion, batch, bar)
        for job in occasion.farm.jobs(state=JobState.SUCCEEDED, batch=done.id):
            saved = occasion.farm.save(job, folder if stem is None else free_path(folder, stem, job))
            if as_json:
                json_line({"path": str(saved.path), "job": job.model_dump(mode="json")})
            else:
                say(str(saved.path))
        explain_failures(occasion.farm, done)
    if done.counts.succeeded < done.total:
        raise typer.Exit(Exit.FAILED)


def _submit(farm: "Farm", prompt: str, count: int, fields: dict[str, Any]) -> BatchView:
    submitted = farm.submit({"prompt": prompt, **fields}, count=count)
    for warning in submitted.warnings:
        say(f"warning: {warning}", err=True)
    return farm.batch(submitted.batch_id) if isinstance(submitted, JobView) else submitted


def _sent(farm: "Farm", fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with every picture that is a file here sent, and named by its hash."""

    def named(picture: str) -> str:
        return picture if HASH.fullmatch(picture) else send(farm, Path(picture)).hash

    sent = {name: named(value) if name in {"image", "mask"} else value for name, value in fields.items()}
    if "controls" in fields:
        sent["controls"] = [{**use, "image": named(use["image"])} for use in fields["controls"]]
    return sent


def _wait_or_cancel(occasion: Occasion, batch: BatchView, bar: Bar) -> BatchView:
    try:
        return occasion.wait(batch, bar.show)
    except KeyboardInterrupt:
        occasion.farm.cancel(batch)
        raise


def _known(stored_as: str | None, motion: str | None) -> Format:
    """What the pictures are stored as. Raises typer.BadParameter for a format there is not."""
    if stored_as is not None and stored_as not in KINDS:
        raise typer.BadParameter(f"{stored_as!r} is none of {', '.join(KINDS)}", param_hint="--format")
    return format_of({"format": stored_as, "motion": motion})


def place(out: Path, prompt: str, count: int, stored_as: Format = "png") -> tuple[Path, str | None]:
    """Where `count` pictures go: a folder, made if need be, and what their names start with, or `None`: exactly `out`.

    Raises InvalidRequest for a file name that does not end as the format does.
    """
    if out.is_dir() or not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        return out, _slug(prompt)
    if out.suffix.lower() not in {f".{KINDS[stored_as].suffix}", f".{stored_as}"}:
        ending = KINDS[stored_as].suffix
        raise InvalidRequest(
            f"{out}: the pictures are {NAMES[stored_as]} files; name one that ends in .{ending}, or a folder, or say "
            "another --format"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    return (out, None) if count == 1 else (out.parent, out.stem)


def free_path(folder: Path, stem: str, job: JobView) -> Path:
    """`<stem>-<seed>.png` (or its format's end), with a number if that is another picture: nothing is overwritten."""
    from farm.client.pictures import holds

    sha256 = job.image.sha256 if job.image else ""
    names = (
        f"{stem}-{job.seed}{suffix}.{job.suffix}" for suffix in chain([""], (f"-{number}" for number in numbers(2)))
    )
    return next(path for name in names if not (path := folder / name).exists() or holds(path, sha256))


def _slug(prompt: str) -> str:
    """The prompt as the start of a file name.

    >>> _slug("A single split crack, on a concrete wall!")
    'a-single-split-crack-on-a-concrete-wall'
    """
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
