"""Memory: what a process does with what it no longer needs."""

import ctypes
from contextlib import suppress

M_MMAP_THRESHOLD = -3
"""Its number in glibc's malloc.h."""


def give_back_from(num_bytes: int) -> None:
    """From now on an array of so many bytes and more is handed back to the kernel when it goes; on glibc, elsewhere as ever.

    Kept for the next one, as `environment.FOR_WORKERS` has it, it costs no new pages; but scans differ in size, and what lies
    between their largest arrays keeps those of the next scan from taking the place of the last one's.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, num_bytes)
