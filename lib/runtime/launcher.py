"""How many processes of a run there are, as `torchrun` or `accelerate launch` says in the environment.

Imports no torch.
"""

import os
import re
from dataclasses import dataclass

from lib.errors import InputError

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE
_ADVICE = "start with torchrun or accelerate launch, or unset WORLD_SIZE"


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started; by default it is the only one."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """True for the process that prints and writes."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.count > 1


def launched() -> Launch:
    """The processes by the environment: only `WORLD_SIZE` says that there are several.

    Raises `InputError` for an environment that no launcher sets.
    """
    count = _number("WORLD_SIZE", 1) if os.environ.get("WORLD_SIZE") else 1
    if count == 1:
        return Launch()
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise InputError(f"WORLD_SIZE={count}: {missing[0]} is not set; {_ADVICE}")
    _number("MASTER_PORT", 1, 65535)
    rank, local_rank = _number("RANK"), _number("LOCAL_RANK")
    local_count = _number("LOCAL_WORLD_SIZE", 1) if os.environ.get("LOCAL_WORLD_SIZE") else 1
    if rank >= count:
        raise InputError(f"RANK={rank}: not below WORLD_SIZE={count}; {_ADVICE}")
    return Launch(rank, count, local_rank, local_count)


def _number(name: str, lowest: int = 0, highest: int = 999_999) -> int:
    """A variable of the environment as a number. Raises `InputError` unless it is one from `lowest` to `highest`."""
    text = os.environ[name]
    if not (re.fullmatch("[0-9]{1,6}", text) and lowest <= int(text) <= highest):
        raise InputError(f"{name}={text[:20]}: is no number from {lowest} to {highest}; {_ADVICE}")
    return int(text)
