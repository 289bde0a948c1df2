"""What a process that trains on a CPU asks of the C library's allocator."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Freed memory stays with this process, for the next step to use.

    Returns whether the C library understood: glibc does.

    glibc gives each large block back to the system at once, so that every step of the same shapes
    met its gigabyte of temporaries as fresh pages: a third of the step's CPU time went into page
    faults. The process keeps its largest footprint. Call it before JAX looks for devices: threads
    keep the arenas that they began with.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
