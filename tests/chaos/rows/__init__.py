"""Every row of the suite with its three sizes: short for `make test`, ci for `make chaos`, large for a night."""

from datetime import timedelta

from tests.chaos.rows.asking import order_at_random, repeat_doorbells
from tests.chaos.rows.killing import crash_at_boundaries, freeze_workers, kill_real_workers, kill_workers
from tests.chaos.rows.leaving import render_poison, roll_workers
from tests.chaos.rows.machines import mix_machines, starve_machines
from tests.chaos.rows.proving import switch_off
from tests.chaos.rows.servers import trouble_postgres, trouble_the_broker
from tests.chaos.rows.soaking import soak
from tests.chaos.rows.storing import trouble_s3
from tests.chaos.suite import Row

ROWS: dict[str, Row] = {
    "R1": Row(
        "SIGKILL of a random worker every second",
        kill_workers,
        short={"jobs": 60, "kills": 3, "workers": 3},
        ci={"jobs": 2_000, "kills": 60},
        large={"jobs": 20_000, "kills": 600},
        lasts=170,
        production=True,
    ),
    "R1-crack-tiny": Row(
        "SIGKILL of workers that render with crack-tiny",
        kill_real_workers,
        short={"jobs": 4, "kills": 1},
        ci={"jobs": 24, "kills": 3},
        large={"jobs": 240, "kills": 30},
        lasts=120,
        real=True,
    ),
    "R2": Row(
        "SIGSTOP of a worker for two leases",
        freeze_workers,
        short={"stops": 5, "workers": 4},
        ci={"stops": 50, "workers": 8},
        large={"stops": 500, "workers": 12},
        lasts=101,
    ),
    "R3": Row(
        "broker killed, down, frozen, full, emptied, littered",
        trouble_the_broker,
        short={"restarts": 1, "every": 1, "down": 2, "turns": 1, "each": 1, "pause": 1, "normal": 1},
        ci={"restarts": 5, "every": 10, "down": 60, "turns": 1, "each": 1, "pause": 5, "normal": 20},
        large={"restarts": 50, "every": 10, "down": 60, "turns": 1, "each": 10, "pause": 5, "normal": 60},
        lasts=200,
        production=True,
    ),
    "R4": Row(
        "Postgres crashed, cut off, locked",
        trouble_postgres,
        short={"crashes": 1, "cutting": 3, "lock": 2},
        ci={"crashes": 3, "cutting": 60, "lock": 15},
        large={"crashes": 30, "cutting": 600, "lock": 15},
        lasts=123,
        production=True,
    ),
    "R5": Row(
        "crash at every boundary",
        crash_at_boundaries,
        short={"crashes": 1, "workers": 4},
        ci={"crashes": 10, "workers": 6},
        large={"crashes": 200, "workers": 8},
        lasts=152,
    ),
    "R6": Row(
        "S3 killed, full, busy, slow, cut off, expired, gone",
        trouble_s3,
        short={"jobs": 42, "delay": 3, "lasting": 0.5, "rounds": 1, "errors": 0.1},
        ci={"jobs": 300, "delay": 30, "lasting": 2, "rounds": 1, "errors": 0.1},
        large={"jobs": 3_000, "delay": 30, "lasting": 4, "rounds": 4, "errors": 0.1},
        lasts=79,
    ),
    "R7": Row(
        "every doorbell ten times, then none",
        repeat_doorbells,
        short={"jobs": 60, "silence": 2},
        ci={"jobs": 1_000, "silence": 60},
        large={"jobs": 10_000, "silence": 60},
        lasts=136,
    ),
    "R8": Row(
        "poison: jobs that crash, hang, eat memory",
        render_poison,
        short={"good": 20, "each": 1, "workers": 3},
        ci={"good": 940, "each": 20, "workers": 6},
        large={"good": 9_400, "each": 200, "workers": 8},
        lasts=186,
        settings={"limit_step": timedelta(seconds=1), "limit_load": timedelta(seconds=2)},
    ),
    "R9": Row(
        "cancel, pause, resume, retry at random",
        order_at_random,
        short={"orders": 40, "batches": 6},
        ci={"orders": 500, "batches": 40},
        large={"orders": 5_000, "batches": 300},
        lasts=104,
    ),
    "R10": Row(
        "rolling restarts and spot notices",
        roll_workers,
        short={"waves": 2, "workers": 2},
        ci={"waves": 3},
        large={"waves": 50},
        lasts=54,
        # A lease that a busy machine keeps: whoever leaves in order loses nothing to the sweeper.
        settings={"lease": timedelta(seconds=10), "grace": timedelta(seconds=12)},
    ),
    "R11": Row(
        "clocks off by an hour, two sweepers, another schema",
        mix_machines,
        short={"jobs": 24},
        ci={"jobs": 200},
        large={"jobs": 2_000},
        lasts=52,
    ),
    "R12": Row(
        "disk full, 64 files, no names",
        starve_machines,
        short={"jobs": 24, "seconds": 2},
        ci={"jobs": 200, "seconds": 10},
        large={"jobs": 2_000, "seconds": 60},
        lasts=27,
    ),
    "R13": Row("fence, sweeper and lease switched off", switch_off, short={}, ci={}, large={}, alone=True, lasts=18),
    "soak": Row(
        "all of it mixed, over many jobs, with memory, connections and tables measured",
        soak,
        short={"jobs": 60, "every": 1, "samples": 3, "errors": 0.1, "workers": 2},
        ci={"jobs": 4_000, "every": 3, "samples": 12, "errors": 0.1},
        large={"jobs": 100_000, "every": 5, "samples": 60, "errors": 0.1, "workers": 4},
        named=True,
        # What is asked here is what stays flat over many jobs; that nothing is torn between two objects, R5 shows.
        settings={"micro_batch": 16, "thumbnail_pixels": 256},
    ),
}
