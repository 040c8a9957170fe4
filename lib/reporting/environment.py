"""The environment of a run, as result.json records it."""

import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

from lib.errors import PACKAGES
from lib.version import code_version


def environment(device: torch.device) -> dict:
    """Version and commit of these scripts, versions of packages, device, threads, platform, command line."""
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        **code_version(),
        "versions": versions,
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "platform": platform.platform(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
