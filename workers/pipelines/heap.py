"""The C heap of a process that renders on its CPU."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
KEPT = 256 << 20
LARGEST_KEPT = 32 << 20
"""glibc takes no more for it."""
LARGEST_ARENA = 64 << 20
"""Of a thread other than the first: glibc's HEAP_MAX_SIZE."""


def keep_pages() -> bool:
    """Let freed memory of up to `KEPT` bytes stay with the process; answers whether this system can do that.

    Activations are allocated and freed thousands of times a picture. By default glibc gives each back to the kernel,
    which hands out the same pages again, zeroed one by one: 2,000 page faults a picture with crack-tiny, a twentieth of
    its processor time. Padding keeps the arenas of threads, which otherwise come and go whatever the threshold says;
    one arena for all would do so too, but threads wait for each other there.
    """
    if not sys.platform.startswith("linux"):
        return False
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is None:
        return False
    asked = ((_MMAP_THRESHOLD, LARGEST_KEPT), (_TRIM_THRESHOLD, KEPT), (_TOP_PAD, LARGEST_ARENA))
    return all(tune(option, value) == 1 for option, value in asked)
