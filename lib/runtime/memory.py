"""Free and used memory of host and accelerator."""

import ctypes
import gc
import math
import os
import re
import resource
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch


def free_cuda_memory(device: torch.device) -> int:
    """Free bytes of a GPU, with those that torch holds and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


# Parameters of glibc's mallopt, and what they are set to, in bytes
_TRIM_THRESHOLD, _KEPT_AT_MOST = -1, 128 * 2**20
_MMAP_THRESHOLD, _LARGEST_KEPT = -3, 32 * 2**20  # the most that glibc takes


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is one that keeps memory as it is told."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):  # of systems that have no such library
        return None


def keep_freed_memory() -> None:
    """Has the memory of tensors that are gone kept for the next ones, which then do not fault in each page anew.

    For the whole process, on the CPU, of tensors of up to 32 MiB; what is free at the end of the heap is given back
    beyond 128 MiB. By glibc, else not at all. Without it a pass through layers spends up to a tenth of its time in the
    kernel.
    """
    if library := _glibc():
        library.mallopt(_TRIM_THRESHOLD, _KEPT_AT_MOST)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)


def free_memory() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if library := _glibc():
        library.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_host_memory() -> int:
    """Bytes that this process may still take: its part of what the machine has, or what its control group allows."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this run on this machine
    return int(max(0, min(psutil.virtual_memory().available, group_memory()))) // beside


_GROUPS = (  # versions of control groups: their folder, and the files of limit, usage, and what of it can be reclaimed
    ("", "sys/fs/cgroup", "memory.max", "memory.current", r"^inactive_file (\d+)$"),
    (
        "memory",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        r"^total_inactive_file (\d+)$",
    ),
)


def group_memory(root: Path = Path("/")) -> float:
    """Bytes that the control groups of this process leave it, those above its own too; infinite without a limit."""
    allowed = math.inf
    with suppress(OSError):  # where there are no control groups
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        for controllers, base, limit, usage, reclaimable in _GROUPS:
            for path in (path for _, found, path in lines if controllers in found.split(",")):
                group = root / base / path.lstrip("/")
                for folder in (group, *group.parents[: len(Path(path).parts) - 1]):
                    with suppress(OSError, ValueError):  # `max`, or a group that is not to be seen from here
                        files = re.search(reclaimable, (folder / "memory.stat").read_text(), re.M)
                        used = int((folder / usage).read_text()) - int(files[1] if files else 0)
                        allowed = min(allowed, int((folder / limit).read_text()) - used)
    return allowed


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that was in use so far: of the accelerator where there is one, else of the process."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _free_memory(device: torch.device) -> int:
    """Free bytes on a device; none on one that does not tell."""
    if device.type == "cuda":
        return free_cuda_memory(device)
    return free_host_memory() if device.type == "cpu" else 0
