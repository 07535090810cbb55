"""The heap of a worker that renders on its CPU."""

import subprocess
import sys

from workers.pipelines.heap import keep_pages

CHURN = """
import resource, sys, threading
from workers.pipelines.heap import keep_pages
assert not sys.argv[1:] or keep_pages()
def churn():
    for _ in range(20):
        # Filled with zeros, byte by byte: every page is touched, as an activation's are.
        held = [bytearray(4_000_000) for _ in range(4)]
        del held
def faults():
    thread = threading.Thread(target=churn)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(2):
    faults()
# The least of several: a thread may begin with an arena that no other has used yet.
print(min(faults() for _ in range(3)))
"""


def faults(*arguments: str) -> int:
    """Page faults of allocating and freeing 16 MB twenty times in a thread, once everything is warm."""
    made = subprocess.run([sys.executable, "-c", CHURN, *arguments], capture_output=True, text=True, check=True)
    return int(made.stdout)


def test_freed_memory_is_taken_again_without_asking_the_kernel() -> None:
    if not sys.platform.startswith("linux"):
        assert keep_pages() is False
        return
    asked, kept = faults(), faults("keep")
    assert kept < 500, (kept, asked)
    assert asked > 1_500, (kept, asked)
