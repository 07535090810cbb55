"""Registering a model from the command line: from the hub or S3 through the API, from this machine straight to S3."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from farm.cli.display import size, waiting
from farm.cli.local import servers
from farm.cli.options import connect
from farm.cli.saying import say
from farm.modelkinds import ModelKind
from farm.views import RegistrationView

LOOK_SECONDS = 0.5
"""Between two looks at a registration."""
TOLD: dict[str, ModelKind] = {
    "checkpoint": "checkpoint", "original": "checkpoint", "vae": "vae", "controlnet": "controlnet",
    "motion": "motion",
}  # fmt: skip
"""What files of each sort are registered as; an adapter is a style."""


def profile_of(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["steps=6", "vae=tiny"]` as a profile. Raises typer.BadParameter."""
    from pydantic import ValidationError

    from farm.families import Profile

    said = dict(pair.partition("=")[::2] for pair in pairs or ())
    try:
        return Profile.model_validate(said).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{first['loc'][0]}: {first['msg']}", param_hint="--profile") from error


def from_afar(
    data_dir: Path, name: str, source: str, kind: ModelKind | None, wanted: Mapping[str, Any], *, wait: bool
) -> RegistrationView:
    """A model that a worker fetches. Answers the registration as it ended, or as it began."""
    given = {key: value for key, value in wanted.items() if value}
    with connect(data_dir) as farm:
        begun = farm.register(kind or "adapter", name, source, **given)
        return _follow(begun, lambda: farm.registration(begun)) if wait else begun


def from_here(
    data_dir: Path,
    name: str,
    path: Path,
    kind: ModelKind | None,
    wanted: Mapping[str, Any],
    *,
    project: str | None,
    wait: bool,
) -> RegistrationView:
    """A model of this machine. Its files are looked at, sent to S3, and then checked by a worker like all others."""
    from farm import catalogue, holding, registrations
    from farm.ids import new_id
    from farm.modelfiles import kind_of, read_raw

    if not path.exists():
        raise typer.BadParameter(
            f"{path}: there is nothing here; a source is a path, s3://bucket/prefix or hf:owner/name@COMMIT"
        )
    found = kind_of(path)
    told: ModelKind = TOLD.get(found, "style")
    chosen = kind or told
    if chosen == "motion" and (others := wanted.get("profile", {}).keys() - {"acceleration"}):
        raise typer.BadParameter(
            f"{', '.join(sorted(others))}: a motion adapter's profile has acceleration only", param_hint="--profile"
        )
    raw = read_raw(path, chosen, wanted.get("variant"))
    with servers(data_dir) as (database, store, configured):
        with database.transaction() as conn:
            begun = registrations.submit(
                conn,
                name=name,
                kind=chosen,
                source=f"local:{path.resolve().name}",
                wanted=wanted,
                pool=configured.pool,
                project=project,
                raw=raw,
                uploader=new_id(),
                lease=configured.lease,
            )
            claim = registrations.held_by(registrations.row_of(conn, begun.id))
        with waiting(f"sending {size(raw.bytes)}"):
            holding.upload(database, configured, claim, lambda: catalogue.upload_files(store, raw))

        def look() -> RegistrationView:
            with database.transaction() as conn:
                return registrations.get(conn, begun.id)

        return _follow(begun, look) if wait else look()


def tell(ended: RegistrationView) -> None:
    """What became of it, for a person."""
    if ended.state == "refused":
        say(f"farm: {ended.name} is refused: {ended.reason}", fg="red", err=True)
        return
    about = f" ({ended.family}, {size(ended.total_bytes or ended.bytes)})" if ended.family else ""
    say(f"{ended.kind} {ended.name}{about} is {ended.state}")
    if not ended.finished_at:
        say(f"follow it: farm models registrations ({ended.id})", err=True)
    for note in ended.notes:
        say(f"note: {note}", err=True)


def _follow(begun: RegistrationView, look: Callable[[], RegistrationView]) -> RegistrationView:
    """Wait until it ends. Ctrl-C only stops the waiting."""
    with waiting(f"registering {begun.name}") as note:
        while (now := look()).finished_at is None:
            done = f" {size(now.bytes)} of {size(now.total_bytes)}" if now.total_bytes and now.bytes else ""
            held_up = f" (will try again: {now.reason})" if now.reason else ""
            note("waiting for a worker" if now.state == "waiting" and not now.reason else now.state + done + held_up)
            time.sleep(LOOK_SECONDS)
    return now
