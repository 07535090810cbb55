"""Worker processes: one device each, one micro-batch after the other.

What holds here, each with a test in tests/workers:

- Set-up runs once, before any work, and a canary picture is rendered and compared before the first claim.
- A crash ends the process, never the job: what it held is rendered elsewhere.
- A message only wakes; what to render is decided by Postgres, and the worker asks by itself when no message comes.
- Nothing in Redis, and no absence of Redis, ends the process or loses work.
- The process renews its claims only while every phase of its work is within that phase's limit, and ends itself if not.
- On SIGTERM it takes nothing new, finishes what fits the grace period and gives the rest back unspent.

Torch is imported below `workers.pipelines` and `workers.training` only.
"""

import os

# Read once by diffusers when it is imported, so it has to be in place before that. `pipelines.load` asserts it.
os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
