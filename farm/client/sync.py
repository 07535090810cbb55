"""The blocking client."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from time import sleep
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload
from uuid import UUID

import httpx

from farm.client import calls, flows, pictures, sse
from farm.client.calls import Call, Id, JobFields, Registered, Row, Rows, States
from farm.client.connection import resolve
from farm.client.flows import Answer, Block, Flow, Send, Sleep
from farm.client.pictures import Download, Downloaded, Saved
from farm.client.problems import error_from
from farm.client.projects import Projects
from farm.client.transport import api_options, arguments, chunks, storage_options
from farm.client.webhooks import Webhooks
from farm.states import JobState
from farm.views import (
    AdapterView,
    BatchView,
    CheckpointView,
    ControlNetView,
    DryRun,
    Event,
    JobView,
    KeyView,
    LaneView,
    MotionView,
    Page,
    RegistrationView,
    UploadView,
    VaeView,
    WorkerView,
)

A = TypeVar("A")
T = TypeVar("T")


class Farm:
    """A farm, over its API. Safe to share between threads; close it, or use it in a `with` block.

    Every method raises the errors of `farm.errors`: Unavailable when nothing answers, NotFound, InvalidRequest with
    its `problems`, and so on. What may be repeated safely is retried a few times first.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        data_dir: Path | str = ".farm",
        *,
        timeout: float = 60.0,
        parallel: int = 8,
    ) -> None:
        """`timeout`: seconds one answer may take to begin. `parallel`: pictures fetched at a time."""
        self.connection = resolve(url, api_key, data_dir)
        self._api = httpx.Client(**api_options(self.connection, timeout))
        self._storage = httpx.Client(**storage_options(self.connection, timeout))
        self._parallel = parallel
        self._random = Random()  # noqa: S311  # jitter, no secret
        self.webhooks = Webhooks(self._request)
        self.projects = Projects(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._api.close()
        self._storage.close()

    # Submitting

    @overload
    def submit(self, prompt: str, *, idempotency_key: str | None = None, **fields: Unpack[JobFields]) -> JobView: ...
    @overload
    def submit(
        self, prompt: Row, *, count: int | None = None, idempotency_key: str | None = None, **fields: Unpack[JobFields]
    ) -> JobView | BatchView: ...
    def submit(
        self, prompt: Row, *, count: int | None = None, idempotency_key: str | None = None, **fields: Unpack[JobFields]
    ) -> JobView | BatchView:
        """Submit one job: a prompt, or a mapping of a job's fields. A `count` above 1 makes a batch of it."""
        return self._request(calls.submit(prompt, count, idempotency_key, fields))

    def submit_many(
        self,
        rows: Rows,
        *,
        name: str = "",
        defaults: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        stop_at_failed_share: float | None = None,
    ) -> BatchView:
        """Submit a batch: prompts or mappings, read and sent as they come, all accepted or none.

        A key is made up unless one is given. Lists are sent again after a failure; a generator can be read only once,
        so give a key of your own to be able to repeat that by hand. `stop_at_failed_share` (above 0, at most 1): once
        that share of the jobs that ended by themselves failed, the batch stops itself.
        """
        call = calls.submit_many(rows, name, defaults or {}, idempotency_key, stop_at_failed_share, dry_run=False)
        return calls.accepted(self._request(call))

    def dry_run(self, rows: Rows, *, name: str = "", defaults: Mapping[str, Any] | None = None) -> DryRun:
        """What `submit_many` would do: how many jobs in how many lanes. Nothing is stored."""
        return calls.rehearsed(self._request(calls.submit_many(rows, name, defaults or {}, dry_run=True)))

    # Reading

    def job(self, job_id: Id) -> JobView:
        return self._request(calls.job(job_id))

    def jobs(
        self, *, state: States = (), labels: Mapping[str, str] | None = None, batch: Id | None = None, page: int = 200
    ) -> Iterator[JobView]:
        """Jobs, fetched `page` at a time as they are asked for; of one batch, or of all."""
        return self._pages(calls.jobs(state, labels or {}, batch, page))

    def batch(self, batch_id: Id) -> BatchView:
        return self._request(calls.batch(batch_id))

    def batches(
        self, *, state: str | None = None, labels: Mapping[str, str] | None = None, page: int = 200
    ) -> Iterator[BatchView]:
        """Batches, fetched `page` at a time; `state` is `active`, `done` or `paused`."""
        return self._pages(calls.batches(state, labels or {}, page))

    def events(self, batch: BatchView | Id, after: str | None = None) -> Iterator[Event]:
        """The events of a batch until it is done, behind the event id `after`; goes on after a broken connection."""
        stream = sse.Stream(calls.id_of(batch), after, self._random)
        while not stream.ended:
            failure: Exception | None = None
            try:
                with self._api.stream(**arguments(stream.call()), timeout=sse.SILENCE) as response:
                    if response.status_code >= 400:
                        failure = error_from(response.status_code, response.read())
                    else:
                        for piece in response.iter_bytes():
                            yield from stream.feed(piece)
            except httpx.TransportError as error:
                failure = error
            if not stream.ended:
                sleep(stream.broke(failure))

    @overload
    def wait(
        self, what: JobView, timeout: float | None = None, on_progress: Callable[[JobView], object] | None = None
    ) -> JobView: ...
    @overload
    def wait(
        self, what: BatchView, timeout: float | None = None, on_progress: Callable[[BatchView], object] | None = None
    ) -> BatchView: ...
    @overload
    def wait(
        self,
        what: JobView | BatchView,
        timeout: float | None = None,
        on_progress: Callable[[Any], object] | None = None,
    ) -> JobView | BatchView: ...
    def wait(
        self,
        what: JobView | BatchView,
        timeout: float | None = None,
        on_progress: Callable[[Any], object] | None = None,
    ) -> JobView | BatchView:
        """The job or batch once nothing of it is queued or running, however it ended.

        `on_progress` is told each view that is new. Raises TimeoutError after `timeout` seconds.
        """
        if isinstance(what, JobView):
            return self._run(flows.wait(calls.job(what.id), flows.job_done, timeout, on_progress, self._random))
        return self._run(flows.wait(calls.batch(what.id), flows.batch_done, timeout, on_progress, self._random))

    # Pictures

    def image(self, job: JobView) -> bytes:
        """The picture of a succeeded job, in the format it asked for."""
        return self._run(pictures.picture(job, self._random))

    def images(self, batch: BatchView | Id) -> Iterator[tuple[JobView, bytes]]:
        """Each succeeded job of a batch with its picture, in order; a few are fetched ahead."""
        return self._ahead(self._succeeded(batch), lambda job: pictures.with_picture(job, self._random))

    def save(self, job: JobView, path: Path | str) -> Saved:
        """The picture of one job as a file; left alone if it is there already."""
        return self._run(pictures.save(job, Path(path), self._random))

    def download(
        self, batch: BatchView | Id, out_dir: Path | str, on_progress: Callable[[Saved, int], object] | None = None
    ) -> Downloaded:
        """The pictures of a batch as files named `NNNNNN-<seed>.png`, or as they end, beside a manifest; run it again
        to go on.

        What is there already with the right content is not fetched again. `on_progress` is told each picture and how
        many there are by then.
        """
        with Download(out_dir) as run:
            for saved in self._ahead(
                self._succeeded(batch), lambda job: pictures.save(job, run.path(job), self._random)
            ):
                done = run.add(saved)
                if on_progress:
                    on_progress(saved, done)
        return run.result()

    def _succeeded(self, batch: BatchView | Id) -> Iterator[JobView]:
        return self.jobs(state=JobState.SUCCEEDED, batch=calls.id_of(batch))

    # Pictures that jobs start from

    def upload(self, picture: Path | str | bytes) -> UploadView:
        """Send a PNG, JPEG or WebP picture: a file, or its bytes. Jobs name it by the `hash` of the answer."""
        return self._run(pictures.send(picture, self._random))

    def uploaded(self, hash_: str) -> UploadView:
        return self._request(calls.uploaded(hash_))

    def uploads(self, *, page: int = 200) -> Iterator[UploadView]:
        return self._pages(calls.uploads(page))

    def delete_upload(self, upload: UploadView | str) -> None:
        """Forget an upload that no job names."""
        hash_ = upload.hash if isinstance(upload, UploadView) else upload
        self._request(calls.delete("uploads", hash_))

    # Changing

    def cancel_job(self, job: JobView | Id) -> JobView:
        return self._request(calls.act_on_job(calls.id_of(job), "cancel"))

    def retry_job(self, job: JobView | Id) -> JobView:
        return self._request(calls.act_on_job(calls.id_of(job), "retry"))

    def replay(self, job: JobView | Id, *, idempotency_key: str | None = None) -> JobView:
        """Render the recipe of a job that has a picture again, as a job of its own.

        Wait for it, and its `replay` tells how far the two pictures are apart.
        """
        return self._request(calls.replay(calls.id_of(job), idempotency_key))

    def delete_job(self, job: JobView | Id) -> None:
        self._request(calls.delete("jobs", calls.id_of(job)))

    def cancel(self, batch: BatchView | Id) -> BatchView:
        return self._request(calls.act_on_batch(calls.id_of(batch), "cancel"))

    def pause(self, batch: BatchView | Id) -> BatchView:
        return self._request(calls.act_on_batch(calls.id_of(batch), "pause"))

    def resume(self, batch: BatchView | Id) -> BatchView:
        return self._request(calls.act_on_batch(calls.id_of(batch), "resume"))

    def retry(self, batch: BatchView | Id) -> BatchView:
        """Queue the failed and cancelled jobs of a batch again."""
        return self._request(calls.act_on_batch(calls.id_of(batch), "retry"))

    def priority(self, batch: BatchView | Id, priority: int) -> BatchView:
        return self._request(calls.set_priority(calls.id_of(batch), priority))

    def delete(self, batch: BatchView | Id) -> None:
        """Delete a batch, its jobs and their pictures."""
        self._request(calls.delete("batches", calls.id_of(batch)))

    # The farm itself

    def checkpoints(self) -> list[CheckpointView]:
        return self._request(calls.checkpoints())

    def adapters(self) -> list[AdapterView]:
        return self._request(calls.adapters())

    def vaes(self) -> list[VaeView]:
        return self._request(calls.vaes())

    def controlnets(self) -> list[ControlNetView]:
        return self._request(calls.controlnets())

    def motions(self) -> list[MotionView]:
        return self._request(calls.motions())

    def register(self, kind: Registered, name: str, source: str, **wanted: Any) -> RegistrationView:
        """Ask for a model from the hub or S3; `wanted` as the API takes it: family, variant, profile, project."""
        return self._request(calls.register(kind, name, source, wanted))

    def registration(self, which: RegistrationView | Id) -> RegistrationView:
        """How far a model is on its way into the farm."""
        return self._request(calls.registration(calls.id_of(which)))

    def registrations(self) -> list[RegistrationView]:
        return self._request(calls.registrations())

    def cancel_registration(self, which: RegistrationView | Id) -> RegistrationView:
        return self._request(calls.cancel_registration(calls.id_of(which)))

    def workers(self) -> list[WorkerView]:
        return self._request(calls.workers())

    def queue(self) -> list[LaneView]:
        return self._request(calls.queue())

    def version(self) -> dict[str, Any]:
        return self._request(calls.version())

    def keys(self) -> list[KeyView]:
        return self._request(calls.keys())

    def create_key(
        self, name: str, *, project: str = "default", scopes: Iterable[str], expires_at: str | None = None
    ) -> KeyView:
        """A new API key; its `key` is shown in this answer and never again. Needs the scope `admin`."""
        return self._request(calls.create_key(project, name, list(scopes), expires_at))

    def revoke_key(self, key_id: UUID | str) -> None:
        self._request(calls.delete("keys", key_id))

    # Carrying out

    def _request(self, call: Call[T]) -> T:
        return self._run(flows.request(call, self._random))

    def _run(self, flow: Flow[T]) -> T:
        try:
            effect = next(flow)
            while True:
                try:
                    result = self._perform(effect)
                except (httpx.TransportError, OSError) as error:
                    effect = flow.throw(error)
                else:
                    effect = flow.send(result)
        except StopIteration as end:
            answer: T = end.value
            return answer

    def _perform(self, effect: Send[Any] | Sleep | Block[Any]) -> Any:
        if isinstance(effect, Sleep):
            return sleep(effect.seconds)
        if isinstance(effect, Block):
            return effect.function()
        client = self._storage if effect.call.storage else self._api
        rows = effect.call.rows
        response = client.request(**arguments(effect.call), content=effect.call.body if rows is None else chunks(rows))
        return Answer(response.status_code, response.headers, response.content)

    def _pages(self, page_from: Callable[[str | None], Call[Page[T]]]) -> Iterator[T]:
        cursor: str | None = None
        while True:
            page = self._request(page_from(cursor))
            yield from page.items
            if not (cursor := page.next_cursor):
                return

    def _ahead(self, items: Iterator[A], work: Callable[[A], Flow[T]]) -> Iterator[T]:
        """The results of the work on each item, in order, a few being worked on at a time."""
        pool = ThreadPoolExecutor(self._parallel, thread_name_prefix="farm-client")
        pending: deque[Future[T]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(self._run, work(item)))
                if len(pending) >= 2 * self._parallel:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
