"""Keeping freed host memory in the process, so that CPU training does not fault its pages in again every step."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc, malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_DEFAULTS = {_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 128 * 1024, _M_MMAP_THRESHOLD: 128 * 1024}


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None


def reuse_host_memory(enable: bool = True) -> str | None:
    """Keep freed host memory in the process (``enable=True``), or return it to the system and restore the defaults.

    By default glibc maps every large tensor anew and unmaps it when freed, and each new page costs a fault, which in
    CPU training is more time than the arithmetic of batch normalisation. With reuse on, large blocks come from the
    heap and stay there: a training step of constant shapes faults nothing after a few steps, for about 10 % more
    resident memory. It applies to the whole process, at any time; nothing calls it at import.

    Args:
        enable: False restores glibc's defaults and gives free memory back to the system.

    Returns:
        None when done, otherwise the reason why nothing was (no glibc; a preloaded allocator keeps memory its own way).
    """
    libc = _glibc()
    if libc is None:
        return "not glibc: the system's allocator is left as it is"
    preloaded = os.environ.get("LD_PRELOAD", "")
    if "malloc" in preloaded:
        return f"another allocator is preloaded: {preloaded}"
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1} if enable else _DEFAULTS
    for option, value in settings.items():
        if libc.mallopt(ctypes.c_int(option), ctypes.c_int(value)) != 1:
            return f"mallopt({option}, {value}) was refused"
    if not enable:
        libc.malloc_trim(ctypes.c_size_t(0))
    return None


if os.environ.get("FUSEDRES_REUSE_HOST_MEMORY") == "1":
    reuse_host_memory()
