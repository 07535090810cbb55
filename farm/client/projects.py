"""Projects and their limits over the API, for admins: `farm.projects.list()`, blocking or awaited."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson

from farm.client.calls import API, JSON, Call, Id, items, segment, view
from farm.views_tenants import ProjectView

PROJECT: Callable[[bytes], ProjectView] = view(ProjectView)


def mine() -> Call[ProjectView]:
    return Call("GET", f"{API}/project", PROJECT)


def every() -> Call[list[ProjectView]]:
    return Call("GET", f"{API}/projects", items(ProjectView))


def change(project: Id, limits: dict[str, int | None]) -> Call[ProjectView]:
    return Call("PATCH", f"{API}/projects/{segment(project)}", PROJECT, body=orjson.dumps(limits), headers=JSON)


class Projects:
    """Projects, of the blocking client."""

    def __init__(self, send: Callable[[Call[Any]], Any]) -> None:
        self._send = send

    def mine(self) -> ProjectView:
        """The project of our own key."""
        found: ProjectView = self._send(mine())
        return found

    def list(self) -> Sequence[ProjectView]:
        """Every project. Needs the scope `admin`."""
        found: Sequence[ProjectView] = self._send(every())
        return found

    def limit(self, project: Id, **limits: int | None) -> ProjectView:
        """Set `queued_jobs`, `running_jobs`, `pixel_steps_per_day`, `requests_per_second` or `upload_bytes`; None takes
        one away. Needs the scope `admin`."""
        changed: ProjectView = self._send(change(project, limits))
        return changed


class AsyncProjects:
    """The same, of the asynchronous client."""

    def __init__(self, send: Callable[[Call[Any]], Awaitable[Any]]) -> None:
        self._send = send

    async def mine(self) -> ProjectView:
        found: ProjectView = await self._send(mine())
        return found

    async def list(self) -> Sequence[ProjectView]:
        found: Sequence[ProjectView] = await self._send(every())
        return found

    async def limit(self, project: Id, **limits: int | None) -> ProjectView:
        changed: ProjectView = await self._send(change(project, limits))
        return changed
