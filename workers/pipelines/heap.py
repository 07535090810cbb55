"""The C heap of a process that renders on its CPU."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
KEPT = 256 << 20
LARGEST_KEPT = 32 << 20
"""glibc takes no more for it."""


def keep_pages() -> bool:
    """Let freed memory of up to `KEPT` bytes stay with the process; answers whether this system can do that.

    Activations are allocated and freed thousands of times a picture. By default glibc gives each back to the kernel,
    which hands out the same pages again, zeroed one by one: 2,000 page faults a picture with crack-tiny, a thirtieth of
    its processor time. One arena for all threads, because the others give back whatever the threshold says.
    """
    if not sys.platform.startswith("linux"):
        return False
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is None:
        return False
    asked = ((_MMAP_THRESHOLD, LARGEST_KEPT), (_TRIM_THRESHOLD, KEPT), (_ARENA_MAX, 1))
    return all(tune(option, value) == 1 for option, value in asked)
