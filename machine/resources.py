"""This machine: bfloat16 in hardware, the peak memory of a process, and how glibc treats freed memory."""

import ctypes
import re
import resource
from pathlib import Path

import torch

# Parameters of glibc's mallopt.
TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3


def keep_pages(keep_freed: bool = True) -> None:
    """Tell glibc to keep freed memory: eager PyTorch on a CPU otherwise faults every large temporary in anew.

    `bench/step.py --default_malloc` measures what that saves. Does nothing where there is no glibc.

    Args:
        keep_freed: False gives freed memory back to the system, which costs time and saves memory.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_THRESHOLD, 1 << 25 if keep_freed else 1 << 16)  # 1 << 25: the most that glibc takes
        libc.mallopt(TRIM_THRESHOLD, 1 << 30 if keep_freed else 1 << 16)
    except (OSError, AttributeError):
        pass


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices in hardware (avx512_bf16 or AMX).

    False where /proc/cpuinfo does not say.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def peak_memory_mb() -> float:
    """Return the peak memory of this process in MB: allocated on the GPU where there is one, else resident.

    Read from /proc where there is one: `ru_maxrss` of a new process starts at what its parent had.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
