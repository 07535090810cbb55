"""Checkpoints, adapters and the rest: names, content hashes, profiles, and how they get into the store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import UUID

from sqlalchemy import Connection, RowMapping

from farm.errors import Conflict, NotFound
from farm.modelfiles import FoundModel, read_adapter, read_checkpoint, read_controlnet
from farm.modelkinds import ADAPTERS, EVERY
from farm.queries import models as rows
from farm.resolving import Catalogue, unknown
from farm.tokens import TokenCounter
from farm.views import AdapterView, CheckpointView, ControlNetView, MotionView, VaeView

DEFAULT_CHECKPOINT = "crack-tiny"
DEFAULT_ACCELERATION = "crack-tiny-lcm"
MOST_CUTS = 64
"""Projects whose part of the catalogue a process keeps: cutting 10,000 models out takes milliseconds, and memory."""
ASSETS = Path(__file__).parent / "assets" / "crack-tiny"


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


def load(conn: Connection, store: ObjectStore | None = None) -> Catalogue:
    """The catalogue of all projects as of now. With a store, prompts can be counted in tokens."""
    checkpoints, adapters, vaes, controlnets, motions = {}, {}, {}, {}, {}
    owners = {}
    for row in rows.available(conn):
        if row["project_id"] is not None:
            owners[row["name"]] = row["project_id"]
        if row["kind"] == "checkpoint":
            checkpoints[row["name"]] = CheckpointView(**row)
        elif row["kind"] == "vae":
            vaes[row["name"]] = _vae_view(row)
        elif row["kind"] == "controlnet":
            controlnets[row["name"]] = ControlNetView(**row)
        elif row["kind"] == "motion":
            motions[row["name"]] = _motion_view(row)
        else:
            adapters[row["name"]] = AdapterView(**row)
    if store is None:
        return Catalogue(checkpoints, adapters, vaes, controlnets, motions, owners=owners)
    tokenizers = rows.tokenizer_files(conn, [view.hash for view in checkpoints.values()])
    keys: dict[str, dict[str, str]] = {}
    for row in tokenizers:
        keys.setdefault(row["hash"], {})[row["path"]] = row["key"]
    tokens = TokenCounter(keys, store.get).count
    return Catalogue(checkpoints, adapters, vaes, controlnets, motions, tokens, owners)


class Kept:
    """The catalogue as one process keeps it: read again once a model changed, by whichever process."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._kept: tuple[UUID | None, Catalogue, dict[UUID, Catalogue]] | None = None

    def load(self, conn: Connection, project_id: UUID) -> Catalogue:
        """What a project may name as of now, for the price of reading one row."""
        # The stamp first: what is registered in between is then read too early, and once more, but never missed.
        stamp = rows.stamp(conn)
        kept = self._kept
        if kept is None or kept[0] != stamp:
            kept = self._kept = (stamp, load(conn, self._store), {})
        _, whole, cuts = kept
        cut = cuts.get(project_id)
        if cut is None:
            if len(cuts) >= MOST_CUTS:
                cuts.clear()
            cut = cuts[project_id] = whole.of(project_id)
        return cut


def list_checkpoints(conn: Connection, seen_by: UUID | None = None) -> list[CheckpointView]:
    """Every registered checkpoint that a project may see, by name; None sees all."""
    return [CheckpointView(**row) for row in rows.every(conn, ["checkpoint"], seen_by)]


def list_adapters(conn: Connection, seen_by: UUID | None = None) -> list[AdapterView]:
    """Every registered adapter that a project may see, by name; None sees all."""
    return [AdapterView(**row) for row in rows.every(conn, ADAPTERS, seen_by)]


def list_vaes(conn: Connection, seen_by: UUID | None = None) -> list[VaeView]:
    """Every registered VAE that a project may see, by name; None sees all."""
    return [_vae_view(row) for row in rows.every(conn, ["vae"], seen_by)]


def list_controlnets(conn: Connection, seen_by: UUID | None = None) -> list[ControlNetView]:
    """Every registered ControlNet that a project may see, by name; None sees all."""
    return [ControlNetView(**row) for row in rows.every(conn, ["controlnet"], seen_by)]


def list_motions(conn: Connection, seen_by: UUID | None = None) -> list[MotionView]:
    """Every registered motion adapter that a project may see, by name; None sees all."""
    return [_motion_view(row) for row in rows.every(conn, ["motion"], seen_by)]


def files(conn: Connection, content_hash: str) -> list[ModelFile]:
    """The files behind a content hash, as a worker fetches them. Raises NotFound."""
    found = [ModelFile(**row) for row in rows.files(conn, content_hash)]
    if not found:
        raise NotFound(f"no model with content hash {content_hash} is stored")
    return found


def put_files(conn: Connection, found: FoundModel) -> bool:
    """Write down where the files of a model will lie, before they are uploaded; answers whether the content is new."""
    return rows.insert_files(
        conn, found.hash, [ModelFile(f.path, key_of(f.sha256), f.sha256, f.bytes) for f in found.files]
    )


def upload_files(store: ObjectStore, found: FoundModel) -> None:
    """Put the files of a model into the store, each under its own hash: one that is there already is not sent again."""
    for file in found.files:
        key = key_of(file.sha256)
        if not store.exists(key):
            store.put(key, file.source, "application/octet-stream", file.sha256)


def publish(conn: Connection, *, name: str, kind: str, found: FoundModel, project_id: UUID | None = None) -> None:
    """Give a stored content a name that jobs may use: all jobs, or those of one project. Raises Conflict if the name is
    taken."""
    if rows.insert(conn, name=name, kind=kind, found=found, project_id=project_id) is None:
        raise Conflict(f"the name {name} is taken; remove it first or choose another")


def is_taken(conn: Connection, name: str) -> bool:
    """Whether a model has this name."""
    return any(row["name"] == name for row in rows.every(conn, EVERY))


def key_of(sha256: str) -> str:
    """The object key of a model's file."""
    return f"models/{sha256[:2]}/{sha256}"


def remove(conn: Connection, name: str) -> None:
    """Forget a name. Accepted jobs keep rendering: they hold the content hash. Raises NotFound."""
    if not rows.remove(conn, name):
        known = [row["name"] for row in rows.every(conn, EVERY)]
        raise NotFound(unknown("model", name, known))


def install_default(conn: Connection, store: ObjectStore) -> None:
    """Register the model that comes with the package, its LCM-LoRA, styles and ControlNets, unless they are there.

    `style-night.safetensors` beside the model becomes the style adapter `crack-tiny-night`, and a folder `control-mask`
    the ControlNet `crack-tiny-mask`.
    """
    base = read_checkpoint(ASSETS)
    wanted = [(DEFAULT_CHECKPOINT, "checkpoint", base)]
    files = [(DEFAULT_ACCELERATION, "acceleration", ASSETS / "lcm-lora.safetensors")]
    styles = sorted(ASSETS.glob("style-*.safetensors"))
    files += [(f"{DEFAULT_CHECKPOINT}-{path.stem.removeprefix('style-')}", "style", path) for path in styles]
    wanted += [(name, kind, read_adapter(path).of_family(base.family)) for name, kind, path in files]
    for path in sorted(ASSETS.glob("control-*/")):
        name = f"{DEFAULT_CHECKPOINT}-{path.name.removeprefix('control-')}"
        wanted.append((name, "controlnet", read_controlnet(path).of_family(base.family)))
    present = {row["name"]: row["hash"] for row in rows.every(conn, EVERY)}
    for name, kind, found in wanted:
        if present.get(name) != found.hash:
            rows.remove(conn, name)
            put_files(conn, found)
            publish(conn, name=name, kind=kind, found=found)
        # Also of a model that is known: the bucket may have been lost since.
        upload_files(store, found)


def _vae_view(row: RowMapping) -> VaeView:
    return VaeView(**row, tiny=bool(row["profile"].get("tiny")))


def _motion_view(row: RowMapping) -> MotionView:
    profile = row["profile"]
    return MotionView(**row, max_frames=profile["max_frames"], acceleration=profile.get("acceleration"))
