"""The device that a run computes on."""

import torch

from lib.errors import InputError, first_line
from lib.runtime.launcher import launched


def resolve_device(device: str) -> torch.device:
    """The torch device of a name; `auto` is CUDA if available, else the CPU.

    A process started by a launcher takes the GPU of its local rank. Raises `InputError` if the device is not available.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and (launch := launched()).are_several:
        device = f"cuda:{launch.local_rank}"
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise InputError(f"--device {device}: not available here; use cpu or auto ({reason})") from error
