"""2:4 sparse weights in torch's semi-structured kernels, which skip half of the products on GPUs that support it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from lib.errors import InputError, first_line
from lib.models.matrices import Matrices

_CAPABILITY = (8, 0)  # Ampere
_DTYPES = (torch.float16, torch.bfloat16)
_ROWS, _COLUMNS = 32, 64  # multiples that every backend supports


def check_device(device: torch.device) -> None:
    """Raises `InputError` unless the device runs 2:4 kernels; tries them on a small matrix."""
    found = str(device)
    if device.type == "cuda" and torch.version.cuda:
        capability = torch.cuda.get_device_capability(device)
        if capability >= _CAPABILITY:
            _try_kernels(device)
            return
        found = f"{torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})"
    raise InputError(
        f"--semi_structured: torch's 2:4 kernels need an NVIDIA GPU of compute capability 8.0 or newer, not {found}; "
        "without the flag 2:4 models are evaluated as dense ones, with the same result"
    )


@torch.no_grad()
def _try_kernels(device: torch.device) -> None:
    try:
        linear = nn.Linear(128, 128, bias=False, dtype=torch.float16, device=device)
        linear.weight.copy_(torch.tensor([0, 0, 1, 1]).repeat(128, 32))
        with compressed([linear]):
            linear(torch.ones(64, 128, dtype=torch.float16, device=device))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"--semi_structured: torch's 2:4 kernels do not run here ({reason}); leave it out") from error


def check_matrices(matrices: Sequence[Matrices], has_dtype: bool = True) -> None:
    """Raises `InputError` unless the kernels support every matrix: a linear's, of that shape and, if known, dtype."""
    for index, layer in enumerate(matrices):
        for name, matrix in layer.items():
            rows, columns = matrix.weight.shape
            where = f"--semi_structured: layer {index} {name}"
            if not isinstance(matrix.module, nn.Linear):
                raise InputError(f"{where} is of a {type(matrix.module).__name__}, not a linear; leave it out")
            if has_dtype and matrix.weight.dtype not in _DTYPES:
                dtype = str(matrix.weight.dtype).removeprefix("torch.")
                raise InputError(f"{where} is in {dtype}, and the kernels take half precision; use --dtype bfloat16")
            if rows % _ROWS or columns % _COLUMNS:
                raise InputError(f"{where} is {rows} x {columns}, no multiple of {_ROWS} x {_COLUMNS}; leave it out")


@contextmanager
def compressed(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """Inside, the linears, already 2:4 sparse, run in the kernels; host memory holds their dense weights."""
    dense = []
    try:
        for linear in linears:
            dense.append((linear, linear.weight.device, linear.weight.data.cpu()))
            linear.weight = nn.Parameter(to_sparse_semi_structured(linear.weight.data), requires_grad=False)
        yield
    finally:
        for linear, device, weight in dense:
            linear.weight = nn.Parameter(weight.to(device), requires_grad=False)
