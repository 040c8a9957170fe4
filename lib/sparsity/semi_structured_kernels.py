"""2:4 sparse weights in torch's semi-structured kernels, which skip half of the products on GPUs that support it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from lib.errors import InputError, first_line, is_out_of_memory
from lib.models.matrices import Matrices

_CAPABILITY = (8, 0)  # Ampere
_DTYPES = (torch.float16, torch.bfloat16)
_ROWS, _COLUMNS = 32, 64  # multiples that every library supports
LIBRARIES = {"cuSPARSELt": SparseSemiStructuredTensorCUSPARSELT, "CUTLASS": SparseSemiStructuredTensorCUTLASS}


def check_device(device: torch.device) -> None:
    """Raises `InputError` unless the device runs 2:4 kernels; tries them on a small matrix."""
    found = str(device)
    if device.type == "cuda" and torch.version.cuda:
        capability = torch.cuda.get_device_capability(device)
        if capability >= _CAPABILITY:
            find_library(device)
            return
        found = f"{torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})"
    raise InputError(
        f"--semi_structured: torch's 2:4 kernels need an NVIDIA GPU of compute capability 8.0 or newer, not {found}; "
        "without the flag 2:4 models are evaluated as dense ones, with the same result"
    )


@cache
def find_library(device: torch.device) -> str:
    """The first of the `LIBRARIES` whose kernels run on the device. Raises `InputError` if none does."""
    reasons = []
    for name in LIBRARIES:
        try:
            _try_kernels(name, device)
            return name
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            reasons.append(f"{name}: {first_line(error)}")
    reason = "; ".join(reasons)
    raise InputError(f"--semi_structured: torch's 2:4 kernels do not run here ({reason}); leave it out")


@torch.no_grad()
def _try_kernels(library: str, device: torch.device) -> None:
    linear = nn.Linear(128, 128, bias=False, dtype=torch.float16, device=device)
    linear.weight.copy_(torch.tensor([0, 0, 1, 1]).repeat(128, 32))
    with compressed([linear], library):
        found = linear(torch.ones(64, 128, dtype=torch.float16, device=device))
    if not found.eq(64).all():
        raise RuntimeError("wrong results")


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
def compressed(linears: Sequence[nn.Linear], library: str | None = None) -> Iterator[None]:
    """Inside, the linears, already 2:4 sparse, run in the kernels; host memory holds their dense weights."""
    with ExitStack() as changes:
        for linear in linears:
            device = linear.weight.device
            changes.callback(_put_back, linear, linear.weight.data.cpu(), device)
            compress = LIBRARIES[library or find_library(device)].from_dense
            linear.weight = nn.Parameter(compress(linear.weight.data), requires_grad=False)
            changes.callback(linear.register_forward_hook(_be_contiguous).remove)
        yield


def _put_back(linear: nn.Linear, weight: torch.Tensor, device: torch.device) -> None:
    linear.weight = nn.Parameter(weight.to(device), requires_grad=False)


def _be_contiguous(linear: nn.Linear, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """Older torch returns what is transposed in memory, on which attention takes its slowest way."""
    return output.contiguous()
