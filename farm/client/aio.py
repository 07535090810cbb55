"""The asynchronous client: the same methods as `farm.client.sync.Farm`, awaited."""

# ruff: noqa: ASYNC109  # `timeout` is a word of the client's, the same in both; it bounds the waiting, not the task

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, overload
from uuid import UUID

import httpx

from farm.client import calls, flows, pictures, sse
from farm.client.calls import AsyncRows, Call, Id, JobFields, Registered, Row, States
from farm.client.connection import resolve
from farm.client.flows import Answer, Block, Flow, Send, Sleep
from farm.client.pictures import Download, Downloaded, Saved
from farm.client.problems import error_from
from farm.client.projects import AsyncProjects
from farm.client.transport import api_options, arguments, async_chunks, storage_options
from farm.client.webhooks import AsyncWebhooks
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


class AsyncFarm:
    """A farm, over its API, for one event loop. Close it, or use it in an `async with` block.

    Every method does what the method of the same name of `Farm` does and is described there; those that answer
    iterators there answer asynchronous iterators here, and `submit_many` reads either kind of iterable.
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
        self.connection = resolve(url, api_key, data_dir)
        self._api = httpx.AsyncClient(**api_options(self.connection, timeout))
        self._storage = httpx.AsyncClient(**storage_options(self.connection, timeout))
        self._parallel = parallel
        self._random = Random()  # noqa: S311  # jitter, no secret
        self.webhooks = AsyncWebhooks(self._request)
        self.projects = AsyncProjects(self._request)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._api.aclose()
        await self._storage.aclose()

    # Submitting

    @overload
    async def submit(
        self, prompt: str, *, idempotency_key: str | None = None, **fields: Unpack[JobFields]
    ) -> JobView: ...
    @overload
    async def submit(
        self, prompt: Row, *, count: int | None = None, idempotency_key: str | None = None, **fields: Unpack[JobFields]
    ) -> JobView | BatchView: ...
    async def submit(
        self, prompt: Row, *, count: int | None = None, idempotency_key: str | None = None, **fields: Unpack[JobFields]
    ) -> JobView | BatchView:
        return await self._request(calls.submit(prompt, count, idempotency_key, fields))

    async def submit_many(
        self,
        rows: AsyncRows,
        *,
        name: str = "",
        defaults: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        stop_at_failed_share: float | None = None,
    ) -> BatchView:
        call = calls.submit_many(rows, name, defaults or {}, idempotency_key, stop_at_failed_share, dry_run=False)
        return calls.accepted(await self._request(call))

    async def dry_run(self, rows: AsyncRows, *, name: str = "", defaults: Mapping[str, Any] | None = None) -> DryRun:
        return calls.rehearsed(await self._request(calls.submit_many(rows, name, defaults or {}, dry_run=True)))

    # Reading

    async def job(self, job_id: Id) -> JobView:
        return await self._request(calls.job(job_id))

    def jobs(
        self, *, state: States = (), labels: Mapping[str, str] | None = None, batch: Id | None = None, page: int = 200
    ) -> AsyncIterator[JobView]:
        return self._pages(calls.jobs(state, labels or {}, batch, page))

    async def batch(self, batch_id: Id) -> BatchView:
        return await self._request(calls.batch(batch_id))

    def batches(
        self, *, state: str | None = None, labels: Mapping[str, str] | None = None, page: int = 200
    ) -> AsyncIterator[BatchView]:
        return self._pages(calls.batches(state, labels or {}, page))

    async def events(self, batch: BatchView | Id, after: str | None = None) -> AsyncIterator[Event]:
        stream = sse.Stream(calls.id_of(batch), after, self._random)
        while not stream.ended:
            failure: Exception | None = None
            try:
                async with self._api.stream(**arguments(stream.call()), timeout=sse.SILENCE) as response:
                    if response.status_code >= 400:
                        failure = error_from(response.status_code, await response.aread())
                    else:
                        async for piece in response.aiter_bytes():
                            for event in stream.feed(piece):
                                yield event
            except httpx.TransportError as error:
                failure = error
            if not stream.ended:
                await asyncio.sleep(stream.broke(failure))

    @overload
    async def wait(
        self, what: JobView, timeout: float | None = None, on_progress: Callable[[JobView], object] | None = None
    ) -> JobView: ...
    @overload
    async def wait(
        self, what: BatchView, timeout: float | None = None, on_progress: Callable[[BatchView], object] | None = None
    ) -> BatchView: ...
    @overload
    async def wait(
        self,
        what: JobView | BatchView,
        timeout: float | None = None,
        on_progress: Callable[[Any], object] | None = None,
    ) -> JobView | BatchView: ...
    async def wait(
        self,
        what: JobView | BatchView,
        timeout: float | None = None,
        on_progress: Callable[[Any], object] | None = None,
    ) -> JobView | BatchView:
        if isinstance(what, JobView):
            return await self._run(flows.wait(calls.job(what.id), flows.job_done, timeout, on_progress, self._random))
        return await self._run(flows.wait(calls.batch(what.id), flows.batch_done, timeout, on_progress, self._random))

    # Pictures

    async def image(self, job: JobView) -> bytes:
        return await self._run(pictures.picture(job, self._random))

    def images(self, batch: BatchView | Id) -> AsyncIterator[tuple[JobView, bytes]]:
        return self._ahead(self._succeeded(batch), lambda job: pictures.with_picture(job, self._random))

    async def save(self, job: JobView, path: Path | str) -> Saved:
        return await self._run(pictures.save(job, Path(path), self._random))

    async def download(
        self, batch: BatchView | Id, out_dir: Path | str, on_progress: Callable[[Saved, int], object] | None = None
    ) -> Downloaded:
        with Download(out_dir) as run:
            async for saved in self._ahead(
                self._succeeded(batch), lambda job: pictures.save(job, run.path(job), self._random)
            ):
                done = run.add(saved)
                if on_progress:
                    on_progress(saved, done)
        return run.result()

    def _succeeded(self, batch: BatchView | Id) -> AsyncIterator[JobView]:
        return self.jobs(state=JobState.SUCCEEDED, batch=calls.id_of(batch))

    # Pictures that jobs start from

    async def upload(self, picture: Path | str | bytes) -> UploadView:
        """Send a PNG, JPEG or WebP picture: a file, or its bytes. Jobs name it by the `hash` of the answer."""
        return await self._run(pictures.send(picture, self._random))

    async def uploaded(self, hash_: str) -> UploadView:
        return await self._request(calls.uploaded(hash_))

    def uploads(self, *, page: int = 200) -> AsyncIterator[UploadView]:
        return self._pages(calls.uploads(page))

    async def delete_upload(self, upload: UploadView | str) -> None:
        """Forget an upload that no job names."""
        hash_ = upload.hash if isinstance(upload, UploadView) else upload
        await self._request(calls.delete("uploads", hash_))

    # Changing

    async def cancel_job(self, job: JobView | Id) -> JobView:
        return await self._request(calls.act_on_job(calls.id_of(job), "cancel"))

    async def retry_job(self, job: JobView | Id) -> JobView:
        return await self._request(calls.act_on_job(calls.id_of(job), "retry"))

    async def replay(self, job: JobView | Id, *, idempotency_key: str | None = None) -> JobView:
        """Render the recipe of a job that has a picture again, as a job of its own.

        Wait for it, and its `replay` tells how far the two pictures are apart.
        """
        return await self._request(calls.replay(calls.id_of(job), idempotency_key))

    async def delete_job(self, job: JobView | Id) -> None:
        await self._request(calls.delete("jobs", calls.id_of(job)))

    async def cancel(self, batch: BatchView | Id) -> BatchView:
        return await self._request(calls.act_on_batch(calls.id_of(batch), "cancel"))

    async def pause(self, batch: BatchView | Id) -> BatchView:
        return await self._request(calls.act_on_batch(calls.id_of(batch), "pause"))

    async def resume(self, batch: BatchView | Id) -> BatchView:
        return await self._request(calls.act_on_batch(calls.id_of(batch), "resume"))

    async def retry(self, batch: BatchView | Id) -> BatchView:
        return await self._request(calls.act_on_batch(calls.id_of(batch), "retry"))

    async def priority(self, batch: BatchView | Id, priority: int) -> BatchView:
        return await self._request(calls.set_priority(calls.id_of(batch), priority))

    async def delete(self, batch: BatchView | Id) -> None:
        await self._request(calls.delete("batches", calls.id_of(batch)))

    # The farm itself

    async def checkpoints(self) -> list[CheckpointView]:
        return await self._request(calls.checkpoints())

    async def adapters(self) -> list[AdapterView]:
        return await self._request(calls.adapters())

    async def vaes(self) -> list[VaeView]:
        return await self._request(calls.vaes())

    async def controlnets(self) -> list[ControlNetView]:
        return await self._request(calls.controlnets())

    async def motions(self) -> list[MotionView]:
        return await self._request(calls.motions())

    async def register(self, kind: Registered, name: str, source: str, **wanted: Any) -> RegistrationView:
        """Ask for a model from the hub or S3; `wanted` as the API takes it: family, variant, profile, project."""
        return await self._request(calls.register(kind, name, source, wanted))

    async def registration(self, which: RegistrationView | Id) -> RegistrationView:
        """How far a model is on its way into the farm."""
        return await self._request(calls.registration(calls.id_of(which)))

    async def registrations(self) -> list[RegistrationView]:
        return await self._request(calls.registrations())

    async def cancel_registration(self, which: RegistrationView | Id) -> RegistrationView:
        return await self._request(calls.cancel_registration(calls.id_of(which)))

    async def workers(self) -> list[WorkerView]:
        return await self._request(calls.workers())

    async def queue(self) -> list[LaneView]:
        return await self._request(calls.queue())

    async def version(self) -> dict[str, Any]:
        return await self._request(calls.version())

    async def keys(self) -> list[KeyView]:
        return await self._request(calls.keys())

    async def create_key(
        self, name: str, *, project: str = "default", scopes: Iterable[str], expires_at: str | None = None
    ) -> KeyView:
        return await self._request(calls.create_key(project, name, list(scopes), expires_at))

    async def revoke_key(self, key_id: UUID | str) -> None:
        await self._request(calls.delete("keys", key_id))

    # Carrying out

    async def _request(self, call: Call[T]) -> T:
        return await self._run(flows.request(call, self._random))

    async def _run(self, flow: Flow[T]) -> T:
        try:
            effect = next(flow)
            while True:
                try:
                    result = await self._perform(effect)
                except (httpx.TransportError, OSError) as error:
                    effect = flow.throw(error)
                else:
                    effect = flow.send(result)
        except StopIteration as end:
            answer: T = end.value
            return answer

    async def _perform(self, effect: Send[Any] | Sleep | Block[Any]) -> Any:
        if isinstance(effect, Sleep):
            return await asyncio.sleep(effect.seconds)
        if isinstance(effect, Block):
            return await asyncio.to_thread(effect.function)
        client = self._storage if effect.call.storage else self._api
        rows = effect.call.rows
        content = effect.call.body if rows is None else async_chunks(rows)
        response = await client.request(**arguments(effect.call), content=content)
        return Answer(response.status_code, response.headers, response.content)

    async def _pages(self, page_from: Callable[[str | None], Call[Page[T]]]) -> AsyncIterator[T]:
        cursor: str | None = None
        while True:
            page = await self._request(page_from(cursor))
            for item in page.items:
                yield item
            if not (cursor := page.next_cursor):
                return

    async def _ahead(self, items: AsyncIterator[A], work: Callable[[A], Flow[T]]) -> AsyncIterator[T]:
        """The results of the work on each item, in order, a few being worked on at a time."""
        slots = asyncio.Semaphore(self._parallel)
        pending: deque[asyncio.Task[T]] = deque()

        async def one(item: A) -> T:
            async with slots:
                return await self._run(work(item))

        try:
            async for item in items:
                pending.append(asyncio.create_task(one(item)))
                if len(pending) >= 2 * self._parallel:
                    yield await pending.popleft()
            while pending:
                yield await pending.popleft()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
