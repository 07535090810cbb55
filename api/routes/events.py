"""What happens in a batch, as server-sent events that a client can take up again where it left off."""

import time
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

import anyio
import orjson
from fastapi import APIRouter, Header
from starlette.responses import StreamingResponse

from api.deps import Farm, FarmDep, ReaderDep
from farm import jobs
from farm.errors import NotFound, TransientError
from farm.views import Event

router = APIRouter(prefix="/batches", tags=["events"])

POLL_SECONDS = 1.0
"""How often the database is asked: a stream costs two short statements a second."""
FULL = 100
"""So many job events in one look mean that more are waiting."""
HEARTBEAT_SECONDS = 15.0
"""After this much silence a comment tells proxies and clients that the line is alive."""
LONGEST_SECONDS = 3600.0
"""A stream ends after this long and the client comes back by Last-Event-ID, with a key that is checked again."""

STREAM = "text/event-stream"
EXAMPLE = (
    'id: 731.0193f0c2-1111-7000-8000-000000000000\nevent: job\ndata: {"id": "0193f0c2-...", "state": "succeeded"}\n\n'
)

AfterId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID", max_length=200, description="The last event that arrived; the stream goes on after it."
    ),
]


@router.get(
    "/{batch_id}/events",
    response_class=StreamingResponse,
    responses={200: {"description": "Events until `done`", "content": {STREAM: {"example": EXAMPLE}}}},
)
async def stream_batch_events(
    batch_id: UUID, caller: ReaderDep, farm: FarmDep, after: AfterId = None
) -> StreamingResponse:
    """Events of a batch: `job` for each job that ended (its document), `progress` when its counts changed (the batch's
    document), and `done` as the last. Comments arrive in between while nothing happens."""
    stream = _Stream(farm, caller.project_id, batch_id, after)
    # The first look comes before the answer begins, so that an unknown batch is a 404 and not a broken stream.
    first = await stream.look()
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream.text(first), media_type=STREAM, headers=headers)


class _Stream:
    """One reader of one batch."""

    def __init__(self, farm: Farm, project_id: UUID, batch_id: UUID, after: str | None) -> None:
        self._farm = farm
        self._project_id = project_id
        self._batch_id = batch_id
        self._after = after
        self._progress: object = None

    async def look(self) -> list[Event]:
        """What happened since the last look."""

        def read() -> list[Event]:
            with self._farm.database.transaction() as conn:
                return jobs.events(conn, self._project_id, self._batch_id, self._after)

        found = await self._farm.watching(read)
        if found:
            self._after = found[-1].id
        return found

    async def text(self, found: list[Event]) -> AsyncIterator[bytes]:
        """The stream itself. It ends after `done`, when the batch is deleted or when the server leaves."""
        ends = time.monotonic() + LONGEST_SECONDS
        spoke = time.monotonic()
        while True:
            for event in self._news(found):
                spoke = time.monotonic()
                yield _event(event)
                if event.event == "done":
                    return
            if time.monotonic() - spoke >= HEARTBEAT_SECONDS:
                spoke = time.monotonic()
                yield b": still here\n\n"
            if sum(event.event == "job" for event in found) < FULL:
                await self._pause()
            if self._farm.closing.is_set() or time.monotonic() > ends:
                return
            try:
                found = await self.look()
            except NotFound:
                return
            except TransientError:
                # Postgres restarts: the stream outlives it, and so does the reader's place in it.
                found = []

    def _news(self, found: list[Event]) -> list[Event]:
        """Without progress that says what was said before."""
        news = []
        for event in found:
            if event.event == "progress":
                if event.data == self._progress:
                    continue
                self._progress = event.data
            news.append(event)
        return news

    async def _pause(self) -> None:
        with anyio.move_on_after(POLL_SECONDS):
            await self._farm.closing.wait()


def _event(event: Event) -> bytes:
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (event.id.encode(), event.event.encode(), orjson.dumps(event.data))
