"""What workers with the real renderer import, and the longest of all: named in the preload of a run that has some, so
that each of them starts in a fraction of a second, as the others do. Importing starts no thread and touches no device.
"""

import gc
import os

# As `workers.main.engine` does before it imports the same.
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"

import workers.pipelines.engine  # noqa: F401

gc.collect()
gc.freeze()
