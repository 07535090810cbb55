"""Limits of projects: how much of each is used, counted under the project's row lock where it must be exact.

Open jobs are what was folded into the project's row and the deltas not folded yet, as of one snapshot. The row lock
comes first and the count second, in a statement of its own: its snapshot then holds whatever was committed before the
lock was granted, and a fold waits for us.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

NAMES = ("queued_jobs", "running_jobs", "pixel_steps_per_day", "requests_per_second", "upload_bytes")

_USE = """
    SELECT p.id, p.name, p.created_at, p.max_queued_jobs AS queued_jobs, p.max_running_jobs AS running_jobs,
           p.max_pixel_steps_per_day AS pixel_steps_per_day, p.max_requests_per_second AS requests_per_second,
           p.max_upload_bytes AS upload_bytes,
           p.queued + d.queued AS queued, p.running + d.running AS running,
           CASE WHEN p.spent_on = (clock_timestamp() AT TIME ZONE 'UTC')::date THEN p.spent_pixel_steps ELSE 0 END
               AS pixel_steps,
           date_trunc('day', clock_timestamp(), 'UTC') + interval '1 day' AS tomorrow, clock_timestamp() AS now
    FROM projects p CROSS JOIN LATERAL (
        SELECT coalesce(sum(queued), 0) AS queued, coalesce(sum(running), 0) AS running
        FROM counter_deltas WHERE project_id = p.id) d
"""

# With what only people look at.
_SHOWN = f"""
    SELECT u.*, coalesce((SELECT sum(bytes) FROM uploads WHERE project_id = u.id), 0) AS uploaded FROM ({_USE}) u
"""

_UPLOADED = text("""
    SELECT p.max_upload_bytes AS most, coalesce(sum(u.bytes), 0) AS used, clock_timestamp() AS now
    FROM projects p LEFT JOIN uploads u ON u.project_id = p.id
    WHERE p.id = :project AND p.max_upload_bytes IS NOT NULL GROUP BY p.id
""")

_LIMITED = text("""
    SELECT max_queued_jobs IS NOT NULL OR max_pixel_steps_per_day IS NOT NULL FROM projects WHERE id = :project
""")

_SPEND = text("""
    UPDATE projects SET spent_on = (CAST(:now AS timestamptz) AT TIME ZONE 'UTC')::date,
        spent_pixel_steps = :pixel_steps WHERE id = :project
""")

_RATE = text("""
    SELECT coalesce(sum(r.succeeded), 0) / 60.0 FROM rates r JOIN batches b ON b.id = r.batch_id
    WHERE b.project_id = :project AND r.slot > clock_timestamp() - interval '70 seconds'
""")

# ix_projects_running_limit: nothing at all where no project has such a limit.
_RUNNING_LEFT = text("""
    SELECT p.id, p.max_running_jobs - p.running - (
        SELECT coalesce(sum(running), 0) FROM counter_deltas WHERE project_id = p.id) AS room
    FROM projects p WHERE p.max_running_jobs IS NOT NULL AND (CAST(:ids AS uuid[]) IS NULL OR p.id = ANY(:ids))
""")

_OWNERS = text("""
    SELECT j.id, j.project_id FROM jobs j JOIN projects p ON p.id = j.project_id AND p.max_running_jobs IS NOT NULL
    WHERE j.id = ANY(:ids)
""")

# Under the locks of the fold and of deletion, so that neither moves counts from one place to the other meanwhile.
_RECOUNT = text("""
    UPDATE projects p SET queued = coalesce(open.queued, 0), running = coalesce(open.running, 0)
    FROM projects q LEFT JOIN (
        SELECT s.project_id, sum(c.queued) AS queued, sum(c.running) AS running
        FROM counters c JOIN segments s ON s.id = c.segment_id WHERE c.queued <> 0 OR c.running <> 0 GROUP BY 1
    ) open ON open.project_id = q.id
    WHERE p.id = q.id AND (p.queued, p.running) IS DISTINCT FROM (coalesce(open.queued, 0), coalesce(open.running, 0))
""")


def limited(conn: Connection, project: UUID) -> bool:
    """Whether submissions of a project are counted at all."""
    return bool(conn.execute(_LIMITED, {"project": project}).scalar())


def lock(conn: Connection, projects: Collection[UUID]) -> None:
    """Hold projects until the transaction ends; submissions with keys to them go on."""
    statement = text("SELECT id FROM projects WHERE id = ANY(:ids) ORDER BY id FOR NO KEY UPDATE")
    conn.execute(statement, {"ids": sorted(projects)})


def use(conn: Connection, project: UUID) -> RowMapping | None:
    """Limits of a project and how much of each is used now."""
    return conn.execute(text(f"{_USE} WHERE p.id = :project"), {"project": project}).mappings().one_or_none()


def shown(conn: Connection, project: UUID) -> RowMapping | None:
    """The same, with the bytes of its uploads (`uploaded`)."""
    return conn.execute(text(f"{_SHOWN} WHERE u.id = :project"), {"project": project}).mappings().one_or_none()


def every(conn: Connection) -> Sequence[RowMapping]:
    """All projects with their limits and use, as `shown`."""
    return conn.execute(text(f"{_SHOWN} ORDER BY u.name")).mappings().all()


def uploaded(conn: Connection, project: UUID) -> RowMapping | None:
    """The most bytes that a project may keep as uploads, and how many it keeps; None where there is no such limit."""
    return conn.execute(_UPLOADED, {"project": project}).mappings().one_or_none()


def spend(conn: Connection, project: UUID, *, pixel_steps: int, now: Any) -> None:
    """What a project has spent on the day of `now`, with what was just accepted."""
    conn.execute(_SPEND, {"project": project, "pixel_steps": pixel_steps, "now": now})


def rate(conn: Connection, project: UUID) -> float:
    """Images per second of a project in the last minute."""
    return float(conn.execute(_RATE, {"project": project}).scalar_one())


def change(conn: Connection, project: UUID, wanted: Mapping[str, int | None]) -> bool:
    """Set limits by name; None takes one away. Answers whether there is such a project."""
    chosen = ", ".join(f"max_{name} = :{name}" for name in NAMES if name in wanted) or "name = name"
    statement = text(f"UPDATE projects SET {chosen} WHERE id = :project")
    return conn.execute(statement, {"project": project, **wanted}).rowcount > 0


def running_left(conn: Connection, projects: Collection[UUID] | None = None) -> dict[UUID, int]:
    """How many more jobs may run of each project that has such a limit; of these projects only, if given."""
    ids = None if projects is None else list(projects)
    return {row.id: int(row.room) for row in conn.execute(_RUNNING_LEFT, {"ids": ids})}


def owners(conn: Connection, jobs: Collection[UUID]) -> dict[UUID, UUID]:
    """The projects of those jobs whose project has a limit of running ones."""
    return {row.id: row.project_id for row in conn.execute(_OWNERS, {"ids": list(jobs)})}


def recount(conn: Connection) -> int:
    """Count the open jobs of every project anew from its segments; answers how many were wrong."""
    return conn.execute(_RECOUNT).rowcount
