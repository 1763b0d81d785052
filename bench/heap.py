"""Lets the C library keep freed memory, so that the operating system's work on fresh pages is not what is timed."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep() -> bool:
    """From now on freed memory is used again and never given back; False where the C library cannot be told so.

    A tensor of 32 MB otherwise comes as fresh pages at every call, whose first touch takes longer than most layers, and
    smaller ones do or do not by what was freed before them: by luck.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
