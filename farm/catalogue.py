"""Checkpoints and adapters: names, content hashes, profiles; how they get into the store and how jobs resolve them."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import orjson
from sqlalchemy import Connection

from farm.errors import Conflict, InvalidModel, NotFound, Problem
from farm.modelfiles import FoundModel, read_adapter, read_checkpoint
from farm.queries import models as rows
from farm.recipe import IN_PIPELINE_KEY, AdapterUse, adapter_set_of, digest, lane_of, normal
from farm.tokens import TokenCounter
from farm.views import AdapterView, CheckpointView

DEFAULT_CHECKPOINT = "crack-tiny"
DEFAULT_ACCELERATION = "crack-tiny-lcm"
ASSETS = Path(__file__).parent / "assets" / "crack-tiny"

CONTENT_TOKENS = 75
"""CLIP reads 77 tokens, its start and end marks among them."""
TEACHER_STEPS = 25
TEACHER_GUIDANCE = 7.5


class ObjectStore(Protocol):
    """The part of `farm.storage.Store` that models need."""

    def put(self, key: str, data: bytes | Path, content_type: str, sha256: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def exists(self, key: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model: path inside it, object key, sha256 (hex), bytes."""

    path: str
    key: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """What names stand for: the recipe without prompt and seed, and what follows from it."""

    body: dict[str, Any]
    lane: str
    adapter_set: str
    pipeline_key: str
    names_json: bytes
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """What jobs may name at one moment. `tokens` counts prompt tokens; it loads tokenizers when first asked."""

    checkpoints: Mapping[str, CheckpointView]
    adapters: Mapping[str, AdapterView]
    tokens: Callable[[str, str], int | None] = field(default=lambda _checkpoint, _prompt: None)

    def too_long(self, checkpoint: str, prompt: str) -> bool:
        """Whether a prompt has more tokens than fit between CLIP's start and end marks."""
        # A token holds at least one byte, and CLIP's normalising leaves the length of ASCII alone: no need to count.
        if prompt.isascii() and len(prompt) <= CONTENT_TOKENS:
            return False
        return (self.tokens(checkpoint, prompt) or 0) > CONTENT_TOKENS

    def resolve(
        self,
        *,
        checkpoint: str,
        adapters: Sequence[tuple[str, float]],
        acceleration: str,
        width: int | None,
        height: int | None,
        steps: int | None,
        guidance_scale: float | None,
        scheduler: str | None,
    ) -> Resolved | list[Problem]:
        """Names to hashes and defaults from the profile, or every problem found."""
        base = self.checkpoints.get(checkpoint)
        if base is None:
            return [{"field": "checkpoint", "problem": _unknown("checkpoint", checkpoint, self.checkpoints)}]
        profile = base.profile
        problems: list[Problem] = []
        uses = self._uses(adapters, base, problems)
        accelerated = acceleration == "lcm-lora"
        accelerator = self._accelerator(base, problems) if accelerated else None
        if accelerated and scheduler not in (None, "lcm"):
            problem = f"acceleration lcm-lora needs scheduler lcm, not {scheduler}; or set acceleration to none"
            problems.append({"field": "scheduler", "problem": problem})
        size = {"width": width or profile["width"], "height": height or profile["height"]}
        low, high = profile.get("min_size", 64), profile.get("max_size", 2048)
        for name, value in size.items():
            multiple = profile.get("size_multiple", 8)
            if not low <= value <= high or value % multiple:
                problem = f"{base.name} renders {low}..{high} pixels in steps of {multiple}, not {value}"
                problems.append({"field": name, "problem": problem})
        if problems:
            return problems
        teacher = {"steps": profile.get("teacher_steps", TEACHER_STEPS)}
        teacher["guidance_scale"] = profile.get("teacher_guidance_scale", TEACHER_GUIDANCE)
        defaults = profile if accelerated else teacher
        body: dict[str, Any] = {
            "version": 1,
            "task": "txt2img",
            **size,
            "steps": steps if steps is not None else int(defaults["steps"]),
            "guidance_scale": normal(guidance_scale if guidance_scale is not None else defaults["guidance_scale"]),
            "scheduler": scheduler or ("lcm" if accelerated else "ddim"),
            "checkpoint": base.hash,
            "adapters": uses,
        }
        if accelerator is not None:
            body["acceleration"] = AdapterUse(hash=accelerator.hash, weight=1.0).model_dump()
        warnings = []
        if accelerated and body["steps"] > 8:
            warnings.append("LCM-LoRA tends to oversaturate beyond 8 steps")
        if accelerated and body["guidance_scale"] > 2.5:
            warnings.append("LCM-LoRA is made for guidance_scale 1.0 to 2.5")
        names = {
            "checkpoint": base.name,
            "adapters": [{"name": name, "weight": normal(weight)} for name, weight in adapters],
            "acceleration": acceleration,
        }
        return Resolved(
            body=body,
            lane=lane_of(body),
            adapter_set=adapter_set_of(uses),
            pipeline_key=digest({key: body[key] for key in IN_PIPELINE_KEY if key in body}),
            names_json=orjson.dumps(names).replace(b"\\", b"\\\\"),
            warnings=tuple(warnings),
        )

    def _uses(
        self, adapters: Sequence[tuple[str, float]], base: CheckpointView, problems: list[Problem]
    ) -> list[dict[str, Any]]:
        uses: list[dict[str, Any]] = []
        for index, (name, weight) in enumerate(adapters):
            adapter = self.adapters.get(name)
            where = f"adapters.{index}.name"
            if adapter is None:
                problems.append({"field": where, "problem": _unknown("adapter", name, self.adapters)})
            elif adapter.family != base.family:
                problem = f"{name} is made for {adapter.family}, but {base.name} is {base.family}"
                problems.append({"field": where, "problem": problem})
            elif adapter.kind == "acceleration":
                problem = f"{name} is an acceleration adapter; it is applied by acceleration: lcm-lora"
                problems.append({"field": where, "problem": problem})
            elif any(use["hash"] == adapter.hash for use in uses):
                problems.append({"field": where, "problem": f"{name} is named twice"})
            else:
                uses.append(AdapterUse(hash=adapter.hash, weight=weight).model_dump())
        return sorted(uses, key=lambda use: str(use["hash"]))

    def _accelerator(self, base: CheckpointView, problems: list[Problem]) -> AdapterView | None:
        found = [a for a in self.adapters.values() if a.kind == "acceleration" and a.family == base.family]
        if not found:
            problem = f"there is no LCM-LoRA for family {base.family}: add one with farm models add, or send none"
            problems.append({"field": "acceleration", "problem": problem})
            return None
        named = base.profile.get("acceleration")
        return next((a for a in found if a.name == named), min(found, key=lambda a: a.created_at))


def load(conn: Connection, store: ObjectStore | None = None) -> Catalogue:
    """The catalogue as of now. With a store, prompts can be counted in tokens."""
    checkpoints, adapters = {}, {}
    for row in rows.available(conn):
        if row["kind"] == "checkpoint":
            checkpoints[row["name"]] = CheckpointView(**row)
        else:
            adapters[row["name"]] = AdapterView(**row)
    if store is None:
        return Catalogue(checkpoints, adapters)
    tokenizers = rows.tokenizer_files(conn, [view.hash for view in checkpoints.values()])
    keys: dict[str, dict[str, str]] = {}
    for row in tokenizers:
        keys.setdefault(row["hash"], {})[row["path"]] = row["key"]
    return Catalogue(checkpoints, adapters, TokenCounter(keys, store.get).count)


class Kept:
    """The catalogue as one process keeps it: read again once a model changed, by whichever process."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._kept: tuple[UUID | None, Catalogue] | None = None

    def load(self, conn: Connection) -> Catalogue:
        """The catalogue as of now, for the price of reading one row."""
        # The stamp first: what is registered in between is then read too early, and once more, but never missed.
        stamp = rows.stamp(conn)
        kept = self._kept
        if kept is None or kept[0] != stamp:
            kept = self._kept = (stamp, load(conn, self._store))
        return kept[1]


def list_checkpoints(conn: Connection) -> list[CheckpointView]:
    """Every registered checkpoint, by name."""
    return [CheckpointView(**row) for row in rows.every(conn, ["checkpoint"])]


def list_adapters(conn: Connection) -> list[AdapterView]:
    """Every registered adapter, by name."""
    return [AdapterView(**row) for row in rows.every(conn, ["acceleration", "style"])]


def files(conn: Connection, content_hash: str) -> list[ModelFile]:
    """The files behind a content hash, as a worker fetches them. Raises NotFound."""
    found = [ModelFile(**row) for row in rows.files(conn, content_hash)]
    if not found:
        raise NotFound(f"no model with content hash {content_hash} is stored")
    return found


def add_checkpoint(conn: Connection, store: ObjectStore, name: str, folder: Path) -> CheckpointView:
    """Store a diffusers folder under a name. Raises InvalidModel (file and reason) or Conflict (name taken)."""
    return CheckpointView(**_add(conn, store, name, "checkpoint", read_checkpoint(folder)))


def add_adapter(
    conn: Connection, store: ObjectStore, name: str, path: Path, kind: str = "style", family: str | None = None
) -> AdapterView:
    """Store a LoRA file under a name. Without `family`, the file's widths tell which checkpoints it fits.

    Raises InvalidModel with file, key and reason, Conflict if the name is taken.
    """
    found = read_adapter(path)
    fitting = sorted(
        {
            view.family
            for view in list_checkpoints(conn)
            if view.profile.get("cross_attention_dim") == found.profile.get("cross_attention_dim")
        }
    )
    if family is None and len(fitting) != 1:
        hint = f"it fits {', '.join(fitting)}" if fitting else "no registered checkpoint has its widths"
        raise InvalidModel(f"{path}: cannot tell the base family ({hint}); name it with --family")
    if family is not None and fitting and family not in fitting:
        raise InvalidModel(f"{path}: its widths are those of {', '.join(fitting)}, not of {family}")
    return AdapterView(**_add(conn, store, name, kind, found.of_family(family or fitting[0])))


def remove(conn: Connection, name: str) -> None:
    """Forget a name. Accepted jobs keep rendering: they hold the content hash. Raises NotFound."""
    if not rows.remove(conn, name):
        known = [row["name"] for row in rows.every(conn, ["checkpoint", "acceleration", "style"])]
        raise NotFound(_unknown("model", name, known))


def install_default(conn: Connection, store: ObjectStore) -> None:
    """Register the model that comes with the package, its LCM-LoRA and its styles, unless they are there already.

    `style-night.safetensors` beside the model becomes the style adapter `crack-tiny-night`.
    """
    base = read_checkpoint(ASSETS)
    wanted = [(DEFAULT_CHECKPOINT, "checkpoint", base)]
    files = [(DEFAULT_ACCELERATION, "acceleration", ASSETS / "lcm-lora.safetensors")]
    styles = sorted(ASSETS.glob("style-*.safetensors"))
    files += [(f"{DEFAULT_CHECKPOINT}-{path.stem.removeprefix('style-')}", "style", path) for path in styles]
    wanted += [(name, kind, read_adapter(path).of_family(base.family)) for name, kind, path in files]
    present = {row["name"]: row["hash"] for row in rows.every(conn, ["checkpoint", "acceleration", "style"])}
    for name, kind, found in wanted:
        if present.get(name) != found.hash:
            rows.remove(conn, name)
            _add(conn, store, name, kind, found)


def _add(conn: Connection, store: ObjectStore, name: str, kind: str, found: FoundModel) -> Mapping[str, Any]:
    stored = []
    for file in found.files:
        key = f"models/{file.sha256[:2]}/{file.sha256}"
        if not store.exists(key):
            store.put(key, file.source, "application/octet-stream", file.sha256)
        stored.append(ModelFile(file.path, key, file.sha256, file.bytes))
    rows.insert_files(conn, found.hash, stored)
    row = rows.insert(conn, name=name, kind=kind, found=found)
    if row is None:
        raise Conflict(f"the name {name} is taken; remove it first or choose another")
    return dict(row)


def _unknown(kind: str, name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(known)) or 'none'}"
    return f"there is no {kind} named {name}; {hint}"
