"""The processes of one run, started by `torchrun` or `accelerate launch`: sharing work and combining results.

Every process runs the same program on its own copy of the model, with a share of the windows. Results over all windows
are combined before any process continues, so all take the same decisions. Only the first process writes.
"""

import atexit
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lib.errors import InputError, first_line
from lib.runtime.launcher import Launch, launched

Json = TypeVar("Json")


@dataclass(frozen=True)
class Ranks(Launch):
    """This process among all processes of a run; by default it is the only one."""

    device: torch.device = torch.device("cpu")  # where tensors must be to be sent

    def share(self, total: int, unit: int) -> slice:
        """This process's slice of `total` windows, cut at multiples of `unit` to keep the batches of a single process.

        With fewer units than processes, it is cut anywhere. A share can be empty.
        """
        if -(-total // unit) < self.count:
            unit = 1
        units = -(-total // unit)
        start, stop = (min(total, units * rank // self.count * unit) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (n, ...) of all processes, concatenated in rank order, on the CPU; n may differ between them."""
        if not self.are_several:
            return rows
        counts = torch.zeros(self.count, dtype=torch.long, device=self.device)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts)
        padded = torch.zeros(int(counts.max()), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count].cpu() for part, count in zip(parts, counts.tolist(), strict=True)])

    def add(self, tensor: torch.Tensor) -> None:
        """Replaces the tensor with its sum over all processes, bit-identical in each."""
        if self.are_several:
            there = tensor.to(self.device)
            dist.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)

    def send(self, tensor: torch.Tensor, owner: int) -> None:
        """Replaces the tensor with that of the process `owner`."""
        if self.are_several:
            there = tensor.to(self.device).contiguous()
            dist.broadcast(there.view(torch.uint8), owner)  # as bytes, because backends do not support every dtype
            if there is not tensor:
                tensor.copy_(there)

    def tell(self, found: Any, owner: int) -> Any:
        """What the process `owner` found, JSON, in every process."""
        if not self.are_several:
            return found
        content = json.dumps(found).encode()
        size = torch.tensor([len(content)], device=self.device)
        dist.broadcast(size, owner)
        content = content if self.rank == owner else bytes(int(size))
        letters = torch.tensor(list(content), dtype=torch.uint8, device=self.device)
        dist.broadcast(letters, owner)
        return json.loads(bytes(letters.cpu().tolist()))

    def agree(self, function: Callable[[], Json]) -> Json:
        """The first process's result of a function, in every process; for reading a file that may change, say."""
        return self.tell(function() if self.is_first else None, 0)

    def wait(self) -> None:
        """Blocks until all processes have called it."""
        self.add(torch.zeros(1))


ALONE = Ranks()


def join(device: torch.device) -> Ranks:
    """Connects to the other processes of this run, if a launcher started several. `device` is that of this process.

    Raises `InputError` when the host they meet at is unknown, which they would wait for.
    """
    if not launched().are_several:
        return ALONE
    host = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise InputError(f"MASTER_ADDR={host}: no such host ({first_line(error)}); name that of rank 0") from error
    from accelerate import PartialState

    # Long timeout: one process may work for hours while the others wait. If one dies, the launcher ends all.
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
    atexit.register(state.destroy_process_group)  # its threads must not outlive the interpreter
    return Ranks(state.process_index, state.num_processes, device=device)
