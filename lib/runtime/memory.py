"""Free and used memory of the host and the accelerator."""

import ctypes
import gc
import math
import re
import resource
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch

from lib.runtime.launcher import launched


def free_cuda_memory(device: torch.device) -> int:
    """Free bytes of a GPU, including those that torch has reserved but does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


# Parameters of glibc's mallopt, and their values in bytes
_TRIM_THRESHOLD, _KEPT_AT_MOST = -1, 128 * 2**20
_MMAP_THRESHOLD, _LARGEST_KEPT = -3, 32 * 2**20  # the largest that glibc accepts


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process if it is glibc, whose memory functions can be tuned, else None."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):  # systems without such a library
        return None


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory so that later allocations reuse it without new page faults.

    Applies to the whole process, to CPU tensors of up to 32 MiB. Free memory at the end of the heap beyond 128 MiB is
    still returned to the system. Does nothing without glibc. With its defaults, a pass through the layers
    spends up to a tenth of its time in the kernel.
    """
    if library := _glibc():
        library.mallopt(_TRIM_THRESHOLD, _KEPT_AT_MOST)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)


def release_memory() -> None:
    """Collects garbage, and returns free memory to the system and the GPU."""
    gc.collect()
    if library := _glibc():
        library.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_host_memory() -> int:
    """Bytes that this process may still allocate: its share of what the machine and its control group have free."""
    return int(max(0, min(psutil.virtual_memory().available, group_memory()))) // launched().local_count


_GROUPS = (  # cgroup v2, then v1: controller, folder, files of limit and usage, reclaimable bytes in memory.stat
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
    """Bytes left by the control groups of this process, including parent groups; infinite without a limit."""
    allowed = math.inf
    with suppress(OSError):  # no control groups here
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        for controllers, base, limit, usage, reclaimable in _GROUPS:
            for path in (path for _, found, path in lines if controllers in found.split(",")):
                group = root / base / path.lstrip("/")
                for folder in (group, *group.parents[: len(Path(path).parts) - 1]):
                    with suppress(OSError, ValueError):  # `max`, or a group not visible from here
                        files = re.search(reclaimable, (folder / "memory.stat").read_text(), re.M)
                        used = int((folder / usage).read_text()) - int(files[1] if files else 0)
                        allowed = min(allowed, int((folder / limit).read_text()) - used)
    return allowed


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of all GPUs if the device is one, else of the process."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(device: torch.device) -> int:
    """Free bytes on a device, 0 if unknown."""
    if device.type == "cuda":
        return free_cuda_memory(device)
    return free_host_memory() if device.type == "cpu" else 0
