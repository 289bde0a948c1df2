"""Settings of the C library's allocator for training on a CPU."""

from __future__ import annotations

import ctypes

# Parameters of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Keep freed memory in this process, for the next step to use.

    By default glibc gives each large block back to the system at once, so every step of the same
    shapes would get its gigabyte of temporaries as fresh pages: a third of a step's CPU time was
    spent in page faults. The process keeps its largest footprint. Call this before JAX looks for
    devices, because threads keep the arenas that they started with.

    Returns:
      Whether the C library accepted the settings; glibc does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    accepted = [mallopt(M_ARENA_MAX, 1), mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)]
    return all(accepted)
