"""Every row of the suite with its three sizes: short for `make test`, ci for `make chaos`, large for a night."""

from tests.chaos.rows.asking import repeat_doorbells
from tests.chaos.rows.killing import crash_at_boundaries, freeze_workers, kill_real_workers, kill_workers
from tests.chaos.rows.proving import switch_off
from tests.chaos.suite import Row

ROWS: dict[str, Row] = {
    "R1": Row(
        "SIGKILL of a random worker every second",
        kill_workers,
        short={"jobs": 60, "kills": 3, "workers": 3},
        ci={"jobs": 2_000, "kills": 60},
        large={"jobs": 20_000, "kills": 600},
        production=True,
    ),
    "R1-crack-tiny": Row(
        "SIGKILL of workers that render with crack-tiny",
        kill_real_workers,
        short={"jobs": 4, "kills": 1},
        ci={"jobs": 24, "kills": 3},
        large={"jobs": 240, "kills": 30},
        real=True,
    ),
    "R2": Row(
        "SIGSTOP of a worker for two leases",
        freeze_workers,
        short={"stops": 5, "workers": 4},
        ci={"stops": 50, "workers": 8},
        large={"stops": 500, "workers": 12},
    ),
    "R5": Row(
        "crash at every boundary",
        crash_at_boundaries,
        short={"crashes": 1, "workers": 4},
        ci={"crashes": 10, "workers": 6},
        large={"crashes": 200, "workers": 8},
    ),
    "R7": Row(
        "every doorbell ten times, then none",
        repeat_doorbells,
        short={"jobs": 60, "silence": 2},
        ci={"jobs": 1_000, "silence": 60},
        large={"jobs": 10_000, "silence": 60},
    ),
    "R13": Row("fence, sweeper and lease switched off", switch_off, short={}, ci={}, large={}, alone=True),
}
