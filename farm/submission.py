"""From what a person asks to recipes: validate, resolve names, count tokens, spool rows for COPY.

Everything is checked before anything is stored, in constant memory: a submission of a million lines costs a file.
"""

import hashlib
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import IO, Any
from uuid import UUID

import orjson
from pydantic import ValidationError

from farm import formats, jsontext, tasks
from farm.errors import InvalidRequest, Problem, TooLarge
from farm.fields import problems_of, refuse_flood
from farm.ids import new_id
from farm.jobspec import JobSpec
from farm.recipe import MAX_SEED, canonical_bytes
from farm.resolving import Catalogue, Resolved
from farm.settings import Settings
from farm.uploads import Known, Size
from farm.views import DryRun

MAX_PROBLEMS = 100
"""Bad lines reported before a submission is refused."""
SETS_APART = 8
"""Adapter sets of a batch that get a segment each in their lane; a sweep's further ones share one."""
LOOKED_AT_ONCE = 500
"""Jobs whose uploads are looked up together."""
PROJECT = b"\x01"
"""Stands for the project's id in spooled rows, which hold no text of users."""


@dataclass(slots=True)
class _Segment:
    id: UUID
    lane: str
    checkpoint: str
    adapter_set: str | None
    priority: int
    jobs: int
    head_run_at: datetime
    head_id: UUID


class Prepared(AbstractContextManager["Prepared"]):
    """A checked submission waiting to be stored: counts in memory, rows in temporary files, removed on exit."""

    def __init__(self, name: str, labels: dict[str, str], priority: int, settings: Settings) -> None:
        self.batch_id = new_id()
        self.name = name
        self.labels = labels
        self.priority = priority
        self.stop_at_failed_share: float | None = None
        self.jobs = 0
        self.pixel_steps = 0
        self.segments: dict[tuple[str, int, str | None], _Segment] = {}
        self.pipeline_keys: set[str] = set()
        self.warnings: dict[str, int] = {}
        directory = settings.spool_dir
        self.job_rows: IO[bytes] = tempfile.TemporaryFile(dir=directory, prefix="farm-")  # noqa: SIM115
        self.recipe_rows: IO[bytes] = tempfile.TemporaryFile(dir=directory, prefix="farm-")  # noqa: SIM115
        self.upload_rows: IO[bytes] = tempfile.TemporaryFile(dir=directory, prefix="farm-")  # noqa: SIM115

    @property
    def lanes(self) -> int:
        return len({lane for lane, _, _ in self.segments})

    @property
    def pipelines(self) -> int:
        return len(self.pipeline_keys)

    def warning_texts(self) -> list[str]:
        """Each different warning once, with how many jobs it concerns where there are several."""
        return [text if n == 1 else f"{text} ({n} jobs)" for text, n in self.warnings.items()]

    def dry_run(self) -> DryRun:
        return DryRun(jobs=self.jobs, lanes=self.lanes, pipelines=self.pipelines, warnings=self.warning_texts())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.job_rows.close()
        self.recipe_rows.close()
        self.upload_rows.close()


def prepare(
    rows: Iterable[Mapping[str, Any] | bytes],
    *,
    defaults: Mapping[str, Any],
    catalogue: Catalogue,
    settings: Settings,
    name: str,
    now: datetime,
    labels: Mapping[str, str] | None = None,
    first_line: int = 1,
    uploads: Known | None = None,
    stop_at_failed_share: float | None = None,
) -> Prepared:
    """Check every row (a dict, or the bytes of one JSON object) and spool what would be stored.

    `now` is the database's clock: jobs without `run_at` are due at once. `uploads` answers which pictures may be named;
    without it none is. `stop_at_failed_share` (above 0, at most 1) is when the batch is to stop itself. Blank lines are
    skipped. Raises InvalidRequest with the first 100 problems (line, field, problem), or when there is no job at all;
    TooLarge when there are more jobs than a batch may have.
    """
    known = uploads or Known(lambda _: {})
    writer = _Writer(dict(defaults), catalogue, settings, name, now, dict(labels or {}), known)
    try:
        # Defaults that are wrong would be found again in every row.
        writer.refuse()
        for line, row in enumerate(rows, first_line):
            writer.add(line, row)
            if len(writer.problems) >= MAX_PROBLEMS:
                break
        writer.check()
        writer.prepared.stop_at_failed_share = stop_at_failed_share
    except BaseException:
        writer.prepared.__exit__(None, None, None)
        raise
    return writer.prepared


class _Writer:
    def __init__(
        self,
        defaults: dict[str, Any],
        catalogue: Catalogue,
        settings: Settings,
        name: str,
        now: datetime,
        labels: dict[str, str],
        uploads: Known,
    ) -> None:
        self.defaults = defaults
        self.uploads = uploads
        self.waiting: list[tuple[int, JobSpec]] = []
        self.catalogue = catalogue
        self.settings = settings
        self.now = now
        self.created = _timestamp(now)
        self.problems: list[Problem] = list(_check_defaults(defaults))
        self.resolved: dict[Any, Resolved | list[Problem]] = {}
        self.sets_apart: Counter[tuple[str, int]] = Counter()
        self.prepared = Prepared(name, labels, int(defaults.get("priority", 0)) if not self.problems else 0, settings)

    def add(self, line: int, row: Mapping[str, Any] | bytes) -> None:
        try:
            fields = _fields(row)
            if fields is None:
                return
            spec = JobSpec.model_validate({**self.defaults, **fields} if self.defaults else fields)
        except ValidationError as error:
            self.problems.extend({"line": line, **problem} for problem in problems_of(error))
            return
        except ValueError as error:
            self.problems.append({"line": line, "field": "", "problem": str(error)})
            return
        self.waiting.append((line, spec))
        if len(self.waiting) >= LOOKED_AT_ONCE:
            self.take()

    def take(self) -> None:
        """Resolve and spool what was added. Their uploads are looked up together, names one by one."""
        some, self.waiting = self.waiting, []
        named = {hash_ for _, spec in some for _, hash_ in tasks.pictures_of(spec)}
        found = self.uploads(named) if named else {}
        for line, spec in some:
            choice = self._choice(spec, found)
            if isinstance(choice, list):
                self.problems.extend({"line": line, **problem} for problem in choice)
            elif not self.problems:
                self._write(spec, choice, line)

    def refuse(self) -> None:
        """Raises InvalidRequest with the first problems, if there are any so far."""
        if self.problems:
            shown = sorted(self.problems, key=lambda problem: problem.get("line", 0))[:MAX_PROBLEMS]
            raise InvalidRequest(f"nothing was accepted: {len(shown)} problem(s) found", shown)

    def check(self) -> None:
        self.take()
        self.refuse()
        if not self.prepared.jobs:
            raise InvalidRequest("there is no job in this submission")

    def _choice(self, spec: JobSpec, found: Mapping[str, Size]) -> Resolved | list[Problem]:
        """What the job's names stand for, or what is wrong with it."""
        problems = [*tasks.problems_of(spec), *formats.problems_of(spec)]
        pictures = list(tasks.pictures_of(spec))
        for field, hash_ in pictures:
            if hash_ not in found:
                problems.append({"field": field, "problem": f"there is no upload {hash_}; send the picture first"})
        if problems:
            return problems
        size = None
        if pictures and spec.width is None and spec.height is None:
            size = found[pictures[0][1]]
        return self._resolve(spec, size)

    def _resolve(self, spec: JobSpec, size: Size | None) -> Resolved | list[Problem]:
        adapters = tuple((use.name, use.weight) for use in spec.adapters)
        task = tasks.Task.of(spec)
        width, height = (size.width, size.height) if size else (spec.width, spec.height)
        key = (
            spec.checkpoint,
            adapters,
            spec.acceleration,
            width,
            height,
            spec.steps,
            spec.guidance_scale,
            spec.scheduler,
            spec.vae,
            task,
        )
        found = self.resolved.get(key)
        if found is None:
            if len(self.resolved) > 20_000:
                self.resolved.clear()
            found = self.catalogue.resolve(
                checkpoint=spec.checkpoint or self.settings.default_checkpoint,
                adapters=adapters,
                acceleration=spec.acceleration,
                width=width,
                height=height,
                steps=spec.steps,
                guidance_scale=spec.guidance_scale,
                scheduler=spec.scheduler,
                vae=spec.vae,
                task=task,
            )
            self.resolved[key] = found
        return found

    def _write(self, spec: JobSpec, choice: Resolved, line: int) -> None:
        prepared = self.prepared
        prepared.pipeline_keys.add(choice.pipeline_key)
        if prepared.jobs + spec.count > self.settings.max_batch_jobs:
            raise TooLarge(
                f"a batch has at most {self.settings.max_batch_jobs} jobs; line {line} goes past that: split the file"
            )
        first = spec.seed if spec.seed is not None else random.getrandbits(53)  # a seed is no secret
        if first + spec.count - 1 > MAX_SEED:
            if spec.seed is not None:
                problem = f"seed + count must stay within {MAX_SEED}"
                self.problems.append({"line": line, "field": "seed", "problem": problem})
                return
            first -= spec.count
        # A moment that is past must not stand before those who waited since.
        run_at = self.now if spec.run_at is None else max(spec.run_at, self.now)
        warnings = self._warnings(spec, choice)
        told = {"prompt": spec.prompt, "negative_prompt": spec.negative_prompt, **formats.recipe_fields(spec)}
        body = tasks.with_pictures({**choice.body, **told}, spec)
        named = {hash_.encode() for _, hash_ in tasks.pictures_of(spec)}
        labels, flag = _escaped(orjson.dumps(spec.labels)), b"t" if spec.metadata else b"f"
        if spec.metadata and (crowded := formats.refuse_crowded(body, choice.names_json, labels)):
            self.problems.append({"line": line, **crowded})
            return
        tail = b"\t".join((choice.names_json, labels, _array(warnings), flag))
        due = self.created if run_at is self.now else _timestamp(run_at)
        for offset in range(spec.count):
            job_id = new_id()
            body["seed"] = first + offset
            canonical = canonical_bytes(body)
            segment = self._segment(choice, spec.priority, run_at, job_id)
            prepared.job_rows.write(
                b"%s\t%s\t%s\t%s\t%d\tqueued\t%s\t%s\t%s\n"
                % (
                    str(job_id).encode(),
                    str(segment.id).encode(),
                    str(prepared.batch_id).encode(),
                    PROJECT,
                    prepared.jobs,
                    choice.adapter_set.encode(),
                    due,
                    self.created,
                )
            )
            prepared.recipe_rows.write(
                b"%s\t\\\\x%s\t%s\t%s\n"
                % (str(job_id).encode(), hashlib.sha256(canonical).hexdigest().encode(), _escaped(canonical), tail)
            )
            prepared.upload_rows.writelines(b"%s\t%s\t%s\n" % (str(job_id).encode(), PROJECT, one) for one in named)
            prepared.jobs += 1
        prepared.pixel_steps += spec.count * body["width"] * body["height"] * body["steps"] * body.get("frames", 1)
        for warning in warnings:
            prepared.warnings[warning] = prepared.warnings.get(warning, 0) + spec.count

    def _segment(self, choice: Resolved, priority: int, run_at: datetime, job_id: UUID) -> _Segment:
        lane, adapter_set = choice.lane, choice.adapter_set
        segments = self.prepared.segments
        segment = segments.get((lane, priority, adapter_set)) or segments.get((lane, priority, None))
        if segment is None:
            # Sweeps may have a million adapter sets: all beyond the first few share one segment.
            self.sets_apart[lane, priority] += 1
            key = adapter_set if self.sets_apart[lane, priority] <= SETS_APART else None
            segment = _Segment(new_id(), lane, choice.body["checkpoint"], key, priority, 0, run_at, job_id)
            segments[lane, priority, key] = segment
        elif (run_at, job_id) < (segment.head_run_at, segment.head_id):
            segment.head_run_at, segment.head_id = run_at, job_id
        segment.jobs += 1
        return segment

    def _warnings(self, spec: JobSpec, choice: Resolved) -> list[str]:
        warnings = list(choice.warnings)
        if spec.negative_prompt and choice.body["guidance_scale"] <= 1:
            warnings.append("negative_prompt has no effect at guidance_scale 1 or less")
        elif self.catalogue.too_long(choice.body["checkpoint"], spec.negative_prompt):
            warnings.append("negative_prompt is longer than 77 tokens; the rest is cut off")
        if self.catalogue.too_long(choice.body["checkpoint"], spec.prompt):
            warnings.append("prompt is longer than 77 tokens; the rest is cut off")
        return warnings


def _fields(row: Any) -> Mapping[str, Any] | None:
    """The fields of one job, or None for a blank line. Raises ValueError."""
    if isinstance(row, (bytes, bytearray)):
        if not row.strip():
            return None
        try:
            row = jsontext.loads(row)
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise ValueError("must be a JSON object")  # noqa: TRY004  # what was sent is wrong, not our code
    refuse_flood(row, len(JobSpec.model_fields))
    return row


def _check_defaults(defaults: Mapping[str, Any]) -> Iterator[Problem]:
    try:
        refuse_flood(defaults, len(JobSpec.model_fields))
        JobSpec.model_validate({"prompt": "-", **defaults})
    except ValidationError as error:
        for problem in problems_of(error):
            yield {"field": f"defaults.{problem['field']}", "problem": problem["problem"]}
    except ValueError as error:
        yield {"field": "defaults", "problem": str(error)}
    if defaults.get("seed") is not None:
        yield {"field": "defaults.seed", "problem": "a seed belongs to a job: shared, it would make equal pictures"}


def _timestamp(moment: datetime) -> bytes:
    return moment.isoformat().encode()


def _escaped(value: bytes) -> bytes:
    """JSON for COPY's text format; it holds no raw tabs or line ends, only backslashes."""
    return value.replace(b"\\", b"\\\\")


def _array(texts: list[str]) -> bytes:
    if not texts:
        return b"{}"
    quoted = (text.replace("\\", "\\\\").replace('"', '\\"') for text in texts)
    return _escaped(("{" + ",".join(f'"{text}"' for text in quoted) + "}").encode())
