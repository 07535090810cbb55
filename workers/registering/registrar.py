"""One registration, start to finish: claim, fetch, check, store, test, publish.

A thread beside the two that render. Only testing needs the device, for one small picture; everything else happens while
jobs go on. Whatever is killed, the row is claimed again, and what was fetched already is used again.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from random import Random
from threading import Lock, Thread
from typing import Any, Protocol
from uuid import UUID

import structlog

from farm import catalogue, registrations
from farm.db import Database
from farm.errors import FarmError, InvalidModel, RenderFailed, Unavailable
from farm.holding import Holding, holding
from farm.logs import about
from farm.modelfiles import FoundModel
from farm.modelkinds import ModelKind
from farm.recipe import Recipe
from farm.registrations import Claim, Lost
from farm.settings import Settings
from farm.sources import parse
from farm.storage import Store
from farm.views import CheckpointView
from workers.exits import Exit, end_process
from workers.leaving import Leaving
from workers.modelstore import ModelStore
from workers.pictures import Pixels
from workers.registering.trying import PICTURES, trial

ROOM = "registering"
"""Folder below the cache where models are fetched to; one per registration."""

log = structlog.get_logger(__name__)
_jitter = Random()  # noqa: S311  # keeps workers from asking in step, guards nothing


class Inspect(Protocol):
    """`workers.pipelines.inspecting.inspect`, which needs torch."""

    def __call__(
        self,
        path: Path,
        kind: ModelKind,
        wanted: Mapping[str, Any],
        scratch: Path,
        checkpoints: Sequence[CheckpointView],
        fetch: Callable[[str], Path],
    ) -> FoundModel: ...


def inspector(*arguments: Any, **more: Any) -> FoundModel:
    """The real one. Torch is imported when the first model is looked at."""
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    found: FoundModel = import_module("workers.pipelines.inspecting").inspect(*arguments, **more)
    return found


class Left(Exception):
    """This process was asked to leave."""


class Registrar:
    """Everything one worker process does with registrations. `once` sees one through."""

    def __init__(
        self,
        database: Database,
        store: Store,
        models: ModelStore,
        settings: Settings,
        worker: UUID,
        leaving: Leaving,
        try_out: Callable[[Recipe, Mapping[str, Pixels]], Pixels],
        *,
        inspect: Inspect = inspector,
        end: Callable[[Exit, str], None] = end_process,
    ) -> None:
        """`try_out` renders one picture with whatever the recipe names, from pictures by hash."""
        self._database, self._store, self._models = database, store, models
        self._settings, self._worker, self._leaving = settings, worker, leaving
        self._try_out, self._inspect, self._end = try_out, inspect, end
        self._room = settings.cache_dir.expanduser() / ROOM
        self._claim: Claim | None = None
        self._lock = Lock()

    def start(self) -> None:
        """Look for registrations until the process leaves."""
        self._leaving.at_last(self.give_back)
        Thread(target=self._run, name="registrar", daemon=True).start()

    def _run(self) -> None:
        while not self._leaving.requested.is_set():
            try:
                while self.once():
                    pass
            except FarmError as error:
                log.warning("could not look for registrations", error=error.message)
            except Exception:
                # The row is left to its lease; asking again is all that a thread can do about it.
                log.exception("registering failed")
            self._leaving.requested.wait(self._settings.poll.total_seconds() * _jitter.uniform(0.5, 1.5))

    def once(self) -> bool:
        """Claim one registration and see it through; answers whether there was one."""
        if self._leaving.requested.is_set():
            return False
        with self._database.transaction() as conn:
            claim = registrations.claim(conn, worker=self._worker, settings=self._settings)
        if claim is None:
            return False
        self._claim = claim
        folder = self._room / str(claim.id)
        with about(registration=claim.id, model=claim.name):
            log.info("registering", kind=claim.kind, source=claim.source, attempt=claim.attempt)
            try:
                with holding(
                    self._database,
                    self._settings,
                    claim,
                    progress=lambda: _bytes(folder),
                    overdue=lambda stage: self._end(Exit.PHASE, f"{stage} {claim.name} takes too long"),
                ) as held:
                    self._see_through(held, folder)
            except Lost:
                log.warning("registration lost: its lease ran out or it was cancelled")
            finally:
                self._claim = None
        return True

    def give_back(self) -> None:
        """Give back what is held, because the process leaves. Raises nothing."""
        with self._lock:
            claim, self._claim = self._claim, None
        if claim is None:
            return
        try:
            with self._database.transaction() as conn:
                registrations.give_back(conn, claim, self._settings)
        except FarmError as error:
            log.warning("registration not given back", error=error.message)

    def _see_through(self, held: Holding, folder: Path) -> None:
        """Every end but a lost lease is written down. Raises Lost."""
        claim = held.claim
        try:
            found, notes = self._work(held, folder)
            with self._database.transaction() as conn:
                registrations.publish(conn, claim, found, notes, self._settings)
            log.info("registered", hash=found.hash, family=found.family, bytes=found.bytes, notes=notes)
            shutil.rmtree(folder, ignore_errors=True)
        except Lost:
            raise
        except Left:
            self.give_back()
        except Exception as error:  # noqa: BLE001  # a registration must end with a reason whatever libraries raise
            self._failed(held, folder, error)

    def _failed(self, held: Holding, folder: Path, error: Exception) -> None:
        reason = registrations.reason_of(error)
        final = registrations.is_final(error)
        log.warning("registration failed", stage=held.stage, final=final, reason=reason, exc_info=_unforeseen(error))
        with self._database.transaction() as conn:
            if final:
                registrations.refuse(conn, held.claim, reason, self._settings)
            else:
                registrations.give_back(conn, held.claim, self._settings, reason)
        if final:
            shutil.rmtree(folder, ignore_errors=True)

    def _work(self, held: Holding, folder: Path) -> tuple[FoundModel, list[str]]:
        claim, limit = held.claim, self._settings.limit_load.total_seconds()
        self._tidy()
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        held.enter("fetching")
        path = self._fetch(held, folder / "source")
        self._go_on(held)
        held.enter("checking", limit)
        with self._database.transaction() as conn:
            known = [one for one in catalogue.list_checkpoints(conn) if one.state == "available"]
            vaes = [one for one in catalogue.list_vaes(conn) if one.state == "available"]
        found = self._inspect(path, claim.kind, claim.wanted, folder / "scratch", known, self._models.fetch)
        found = found.coming_from(source=claim.source, revision=_revision(claim))
        self._go_on(held)
        held.enter("storing")
        with self._database.transaction() as conn:
            registrations.store(conn, claim, found)
        catalogue.upload_files(self._store, found)
        self._go_on(held)
        held.enter("testing", limit)
        self._models.adopt(found.hash, ((file.path, file.source) for file in found.files))
        return found, self._test(claim, found, known, vaes)

    def _fetch(self, held: Holding, folder: Path) -> Path:
        claim = held.claim
        if claim.raw is not None:
            return self._models.fetch(claim.raw)
        from workers.registering.fetching import fetch

        def told(total: int) -> None:
            self._go_on(held)
            with self._database.transaction() as conn:
                registrations.enter(conn, claim, "fetching", total_bytes=total)

        try:
            source = parse(claim.source)
        except ValueError as error:
            raise InvalidModel(str(error)) from error
        return fetch(source, claim.kind, claim.wanted, folder, self._settings, told)

    def _test(self, claim: Claim, found: FoundModel, known: Sequence[CheckpointView], vaes: Sequence[Any]) -> list[str]:
        """Load it and render with it; answers what a person should know. Raises InvalidModel."""
        recipe, notes = trial(claim, found, known, vaes)
        if recipe is None:
            return notes
        try:
            picture = self._try_out(recipe, PICTURES)
        except RenderFailed as error:
            if error.details.get("fatal"):
                raise
            raise InvalidModel(f"the test picture could not be rendered: {error.message}") from error
        if picture.min() == picture.max():
            raise InvalidModel("the test picture has one colour only; the weights are not those of a trained model")
        return notes

    def _go_on(self, held: Holding) -> None:
        held.check()
        if self._leaving.requested.is_set():
            raise Left

    def _tidy(self) -> None:
        """Remove what registrations left here that ended elsewhere."""
        self._room.mkdir(parents=True, exist_ok=True)
        for folder in self._room.iterdir():
            try:
                with self._database.transaction() as conn:
                    ended = registrations.get(conn, UUID(folder.name)).finished_at is not None
            except (FarmError, ValueError) as error:
                if isinstance(error, Unavailable):
                    raise
                ended = True
            if ended:
                shutil.rmtree(folder, ignore_errors=True)


def _revision(claim: Claim) -> str | None:
    try:
        return parse(claim.source).revision
    except ValueError:
        # A local folder's name: its contents are all there is to know.
        return None


def _bytes(folder: Path) -> int:
    """Bytes fetched so far; files come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _unforeseen(error: Exception) -> Exception | None:
    return None if isinstance(error, FarmError) else error
