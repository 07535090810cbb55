"""One training process per device: `torchrun`, without its traceback over a child that has said what was wrong."""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

PROGRAM = "workers.training.run"


def main(devices: int) -> int:
    """Run the trainer in so many processes; the exit code of the first that failed, 130 when stopped by a signal."""
    try:
        run.main(["--standalone", f"--nproc-per-node={devices}", "-m", PROGRAM])
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return max(1, int(first.exitcode))
    except SignalException:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
