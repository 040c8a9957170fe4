"""Runs a script on GPUs that are not there, under CUDA's rules. Needs g++ and a build of torch without CUDA.

    python -m tests.pretend_cuda [--gpus 2] [--bytes 3000000] [--fail_at 100 ...] ppllms.py --device cuda ...

A tensor "on cuda:0" wraps one on the CPU, which computes for it. What mixes devices raises, and `.numpy()` too, as on a
GPU. Memory is counted by storage: beyond `--bytes`, and at chosen allocations, it is out. Waits for the
GPU, kernel launches and copies are counted by the line of `lib` that asked for them, and printed at the end.

What it does not show: streams (nothing runs beside anything else), races, speed, and CUDA's numerics. Kernels of Triton
are not run, since there is no Triton device.
"""

import argparse
import ctypes
import gc
import hashlib
import importlib
import os
import runpy
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # its tables of functions are made before any is replaced
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
CPU = torch.device("cpu")

Fails = Callable[[int, int], bool]

# What is counted ------------------------------------------------------------------------------------------------------


class Gpus:
    """Their memory, and what was asked of them."""

    def __init__(self, count: int, limit: int, fails: "Fails"):
        """`limit`: bytes of each; `fails(n, size)`: if memory is out at the n-th allocation, whatever is free."""
        self.count, self.limit, self.fails = count, limit, fails
        self.held, self.peak = [0] * count, [0] * count
        self.allocations = self.largest = 0
        self.refused: list[str] = []  # by line
        self.waits: Counter[tuple[str, str]] = Counter()  # by what, and the line that waits
        self.launches: Counter[str] = Counter()  # by line
        self.copied: dict[tuple[str, str], int] = defaultdict(int)  # bytes, by direction and line
        self._storages: dict[int, list[int]] = {}  # by address: device, bytes, wrappers

    def allocate(self, device: int, tensor: torch.Tensor) -> "Share":
        """The share of a new wrapper in the storage of a tensor. Raises `torch.OutOfMemoryError`."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self.allocations += 1
            if self.held[device] + size > self.limit or self.fails(self.allocations, size):
                self.refused.append(_line())
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes on GPU {device}.")
            self._storages[key] = [device, size, 0]
            self.largest = max(self.largest, size)
            self.held[device] += size
            self.peak[device] = max(self.peak[device], self.held[device])
        self._storages[key][2] += 1
        return Share(self, key)

    def release(self, key: int) -> None:
        device, size, wrappers = self._storages[key]
        self._storages[key][2] -= 1
        if wrappers == 1:
            self.held[device] -= size
            del self._storages[key]

    def wait(self, what: str) -> None:
        self.waits[what, _line()] += 1

    def describe(self, most: int = 15) -> str:
        peaks = ", ".join(f"{peak / 2**20:.2f}" for peak in self.peak)
        lines = [f"allocations {self.allocations}, refused {len(self.refused)}, peak {peaks} MiB"]
        lines += ["", f"{self.launches.total():,} launches"]
        lines += [f"{count:>9,}  {line}" for line, count in self.launches.most_common(most)]
        lines += ["", f"{self.waits.total():,} waits"]
        lines += [f"{count:>9,}  {what:<24} {line}" for (what, line), count in self.waits.most_common(most)]
        copied = sorted(self.copied.items(), key=lambda one: -one[1])[:most]
        lines += ["", "MiB copied", *(f"{size / 2**20:>9.2f}  {way:<24} {line}" for (way, line), size in copied)]
        return "\n".join(lines)


class Share:
    """What a wrapper holds of a storage, for as long as it lives."""

    def __init__(self, gpus: Gpus, key: int):
        self._gpus, self._key = gpus, key

    def __del__(self):
        self._gpus.release(self._key)

    def __deepcopy__(self, memo):
        return None


def _line() -> str:
    """The innermost line of `lib` that is being run."""
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(str(ROOT / "lib")):
        frame = frame.f_back
    if not frame:
        return "elsewhere"
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"


# Tensors --------------------------------------------------------------------------------------------------------------

_current: Gpus | None = None


def gpus() -> Gpus:
    assert _current, "a tensor outlived its pretended GPU"
    return _current


class PretendTensor(torch.Tensor):
    """A tensor of a GPU, around one on the CPU (`inner`) of the same shape."""

    inner: torch.Tensor
    share: Share | None

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False):
        if device is None:  # libraries make a parameter of the class of another
            return torch.nn.Parameter(inner, requires_grad)
        assert device.index is not None
        share = gpus().allocate(device.index, inner)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        made.inner, made.share = inner, share
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})

    def __repr__(self):
        return f"PretendTensor({self.inner!r}, device={self.device})"

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self):
        gpus().wait("tolist")
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def is_pinned(self, *args):
        return False

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        assert value.device.index is not None
        self.inner, self.share = value.inner, gpus().allocate(value.device.index, value.inner)


# CUDA's rules ---------------------------------------------------------------------------------------------------------

_KNOWN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, PretendTensor)
_WAITING = {  # the shape of what they give depends on values, or they give one
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount"),
    *("_local_scalar_dense", "is_nonzero", "equal", "linalg_eigh", "linalg_eig", "multinomial"),
}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
_NO_KERNEL = {  # views, and what only allocates
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "t", "permute", "numpy_T", "expand", "unfold"),
    *("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "diagonal", "as_strided"),
    *("unsqueeze", "squeeze", "detach", "alias", "lift_fresh", "is_same_size", "sym_size", "resize_"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "equal"),
}
_TAKES_NO_CPU_SCALAR = {
    *("mm", "bmm", "addmm", "addmm_", "addmv_", "baddbmm", "cat", "stack", "index_select", "gather", "scatter"),
    *("scatter_", "index_add_", "embedding", "linalg_cholesky_ex", "linalg_solve_triangular", "nll_loss_forward"),
    *("native_layer_norm", "set_"),
}


def run(operation, args: Sequence, kwargs: dict):
    """An operation on tensors of any device, as CUDA would do it."""
    name = operation._schema.name.rpartition("::")[2]
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(type(leaf) not in _KNOWN for leaf in leaves):
        return NotImplemented  # of another subclass, which asks again for its parts
    device = _whole_device(kwargs["device"]) if kwargs.get("device") is not None else None
    pretended = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
    if not pretended and (device is None or device.type != "cuda"):
        return operation(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
    if name in ("_to_copy", "to"):
        return _moved(args[0], device, kwargs)
    if name == "copy_":
        (into, source), non_blocking = args[:2], args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        _inner(into).copy_(_inner(source))
        _count_move(source, source.device, into.device, non_blocking)
        return into
    home = device or _common_device(operation, name, args, leaves)
    _count(name, args)
    kwargs = kwargs | ({"device": CPU} if device is not None else {})
    kwargs.pop("pin_memory", None)
    found = _computed(operation, *tree_map(_inner, (list(args), kwargs)))
    known = {id(one.inner): one for one in pretended}

    def wrapped(value):
        if not isinstance(value, torch.Tensor) or home.type == "cpu":
            return value
        return known[id(value)] if id(value) in known else PretendTensor(value, home)

    return tree_map(wrapped, found)


def _inner(value):
    return value.inner if isinstance(value, PretendTensor) else value


def _whole_device(device) -> torch.device:
    """A device with its number. Raises `RuntimeError` for a GPU that there is not."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", _guard().current())
    if device.type == "cuda" and device.index >= gpus().count:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device


def _common_device(operation, name: str, args: Sequence, leaves: Sequence[torch.Tensor]) -> torch.device:
    """The one GPU of an operation's tensors. Raises `RuntimeError` for several devices.

    CPU tensors may be scalars of element-wise operations, and indices.
    """

    def is_free(leaf: torch.Tensor) -> bool:
        if leaf.device.type == "cuda":
            return False
        if name in _INDEXING:
            return leaf.dim() == 0 or any(leaf is index for index in args[1] if index is not None)
        return leaf.dim() == 0 and name not in _TAKES_NO_CPU_SCALAR

    found = list(dict.fromkeys(leaf.device for leaf in leaves if not is_free(leaf)))
    if len(found) != 1 or found[0].type != "cuda":
        places = " and ".join(map(str, dict.fromkeys(leaf.device for leaf in leaves)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {places} ({operation})")
    return found[0]


def _moved(source: torch.Tensor, device: torch.device | None, kwargs: dict) -> torch.Tensor:
    target = device or source.device
    rest = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    found = aten._to_copy.default(_inner(source), **rest)
    _count_move(source, source.device, target, kwargs.get("non_blocking", False))
    return PretendTensor(found, target) if target.type == "cuda" else found


def _count(name: str, args: Sequence) -> None:
    """Counts a launch, and a wait."""
    if name not in _NO_KERNEL:
        gpus().launches[_line()] += 1
    if name in _WAITING:
        gpus().wait(name)
    for index in args[1] if name in _INDEXING else ():
        is_fill = len(args) > 2 and args[2].numel() == 1 and args[2].device.type == "cpu"
        if index is not None and index.dtype == torch.bool and not is_fill:
            gpus().wait("boolean index")
        elif index is not None and index.device.type == "cpu":
            gpus().wait("index from the CPU")


def _count_move(tensor: torch.Tensor, source: torch.device, target: torch.device, non_blocking: bool) -> None:
    if source == target:
        gpus().launches[_line()] += 1
        return
    gpus().copied[f"{source.type} to {target.type}", _line()] += tensor.numel() * tensor.element_size()
    if not (non_blocking and source.type == "cuda"):  # from pageable memory a copy waits in any case
        gpus().wait(f"copy to {target.type}")


def _computed(operation, args: Sequence, kwargs: dict):
    """What the CPU makes of an operation, also of one that only CUDA has."""
    if operation is getattr(aten.mm, "dtype", None):  # products of half precision, summed in another
        return torch.mm(args[0].float(), args[1].float()).to(args[2])
    if operation is aten._cslt_compress.default:
        return args[0].clone()
    if operation is aten._cslt_sparse_mm.default:
        found = args[0] @ args[1]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        found = found if bias is None else found + bias[:, None]
        return found.T.contiguous() if kwargs.get("transpose_result") else found
    return operation(*args, **kwargs)


class _Mode(TorchDispatchMode):
    """Sees what makes the first tensor of a GPU: factories, and copies to it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


@contextmanager
def _modes() -> Iterator[None]:
    """What a thread needs."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


# In C++ ---------------------------------------------------------------------------------------------------------------

_GUARD = r"""
// Remembers which GPU is current, for a build of torch that knows none.
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;
namespace {
DeviceIndex now = 0, number = 1;
struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return Device(DeviceType::CUDA, now); }
  void setDevice(Device device) const override { if (device.index() >= 0) now = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { if (device.index() >= 0) now = device.index(); }
  Device exchangeDevice(Device device) const override { Device before = getDevice(); setDevice(device); return before; }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return Stream(Stream::DEFAULT, stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return number; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
extern "C" int current() { return now; }
extern "C" void set_current(int index) { now = index; }
extern "C" void set_number(int count) { number = count; }
"""
_HOOKS = r"""
// What autograd asks of an accelerator. Loaded before torch, whose own answer is that there is none.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceType.h>
#include <optional>
#define SEEN __attribute__((visibility("default")))
struct Hooks : at::CUDAHooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  bool isPinnedPtr(const void*) const override { return false; }
};
namespace at::accelerator {
SEEN std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}
namespace at::detail {
SEEN const CUDAHooksInterface& getCUDAHooks() { static Hooks* hooks = new Hooks; return *hooks; }
}
"""
_guard_library: ctypes.CDLL | None = None


def _guard() -> ctypes.CDLL:
    global _guard_library
    _guard_library = _guard_library or ctypes.CDLL(str(_compiled(_GUARD)))
    return _guard_library


def _compiled(source: str) -> Path:
    """The library of some C++; made once, in a second or two."""
    spec = find_spec("torch")
    assert spec and spec.origin
    folder = Path(spec.origin).parent
    digest = hashlib.sha256(f"{source} {folder}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"pretend-cuda-{os.getuid()}-{digest}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as place:
            code, made = Path(place) / "code.cpp", Path(place) / "made.so"
            code.write_text(source)
            where = [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}"]
            command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", *where, str(code), "-o", str(made), "-lc10"]
            subprocess.run(command, check=True, capture_output=True)
            path.with_suffix(f".{os.getpid()}").write_bytes(made.read_bytes())
            os.replace(path.with_suffix(f".{os.getpid()}"), path)
    return path


def environment() -> dict[str, str]:
    """That of a process in which gradients go back through pretended tensors."""
    return {**os.environ, "LD_PRELOAD": str(_compiled(_HOOKS))}


# torch.cuda -----------------------------------------------------------------------------------------------------------


class _Stream:
    """A stream, or an event: nothing runs beside anything else."""

    cuda_stream, device = 0, torch.device("cuda:0")

    def __init__(self, *args, **kwargs): ...

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def query(self):
        return True

    def record_event(self, event=None):
        return event or _Stream()

    def __getattr__(self, name):  # synchronize, wait_stream, record ...
        return lambda *args, **kwargs: None


def _replacements(pretended: Gpus) -> dict[str, object]:
    """What stands in for functions of `torch.cuda`."""

    def index(device=None) -> int:
        found = device if isinstance(device, int | None) else torch.device(device).index
        return _guard().current() if found is None else found

    def set_device(device) -> int:
        before = _guard().current()
        if index(device) >= 0:
            _guard().set_current(index(device))
        return before

    properties = dict(name="pretended", major=9, minor=0, total_memory=pretended.limit, multi_processor_count=1)
    nothing = dict.fromkeys(("_lazy_init", "init", "manual_seed", "manual_seed_all", "ipc_collect"), lambda *args: None)
    return {
        **nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: pretended.count,
        "current_device": lambda: _guard().current(),
        "set_device": set_device,
        "_exchange_device": set_device,
        "_maybe_exchange_device": set_device,
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(**properties),
        "mem_get_info": lambda device=None: (pretended.limit - pretended.held[index(device)], pretended.limit),
        "memory_allocated": lambda device=None: pretended.held[index(device)],
        "memory_reserved": lambda device=None: pretended.held[index(device)],
        "max_memory_allocated": lambda device=None: pretended.peak[index(device)],
        "synchronize": lambda device=None: pretended.wait("synchronize"),
        "empty_cache": lambda: None,
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda stream: _Stream(),
        "current_stream": lambda device=None: _Stream(),
    }


@contextmanager
def pretend_cuda(count: int = 1, limit: int = 80 * 2**30, fails: Fails = lambda n, size: False) -> Iterator[Gpus]:
    """Inside the block there are so many GPUs of so many bytes."""
    global _current
    submit, swaps = ThreadPoolExecutor.submit, torch.__future__.get_swap_module_params_on_conversion()

    def submit_in_modes(self, function, /, *args, **kwargs):
        def inside():
            with _modes():
                return function(*args, **kwargs)

        return submit(self, inside)

    _current = pretended = Gpus(count, limit, fails)
    _guard().set_number(count)
    _guard().set_current(0)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(torch.cuda, **_replacements(pretended)))
            stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", submit_in_modes))
            stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self, *args: self))
            stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda self, stream: None))
            stack.enter_context(_modes())
            yield pretended
    finally:
        gc.collect()
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        _current = None


# A script -------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=80 * 2**30, help="of each GPU")
    parser.add_argument("--fail_at", type=int, nargs="+", default=[], help="allocations at which memory is out")
    parser.add_argument("script", help="a script at the top, or a module of lib")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    importlib.import_module("transformers.modeling_utils")  # before anything is replaced
    sys.path.insert(0, str(ROOT))
    sys.argv = [args.script, *args.flags]
    is_file, status = args.script.endswith(".py"), 0
    with pretend_cuda(args.gpus, args.bytes, lambda number, size: number in args.fail_at) as pretended:
        try:
            runpy.run_path(str(ROOT / args.script), run_name="__main__") if is_file else runpy.run_module(
                args.script, run_name="__main__"
            )
        except SystemExit as end:
            status = int(end.code or 0)
    print(pretended.describe())
    return status


if __name__ == "__main__":
    if "pretend-cuda" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, "-m", "tests.pretend_cuda", *sys.argv[1:]], environment())
    os.environ.pop("LD_PRELOAD")
    sys.exit(main())
