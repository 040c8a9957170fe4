"""The environment of a run, as result.json records it."""

import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")


def environment(device: torch.device) -> dict:
    """Versions, device, threads, platform and command line."""
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": versions,
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
