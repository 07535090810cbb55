"""What a launcher starts in the tests in place of the trainer: it writes down what it was told, and ends as asked."""

import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER, ENDS = "FARM_TEST_FOLDER", "FARM_TEST_ENDS"
STOPPED = "stopped"

if __name__ == "__main__":
    told = {name: value for name, value in os.environ.items() if name not in {FOLDER, ENDS}}
    Path(os.environ[FOLDER], os.environ["RANK"]).write_text(json.dumps(told))
    if os.environ[ENDS] == STOPPED:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    sys.exit(int(os.environ[ENDS]))
