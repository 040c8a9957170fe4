"""How many processes of a run there are, as `torchrun` or `accelerate launch` says in the environment.

Imports no torch.
"""

import os
from dataclasses import dataclass

from lib.errors import InputError

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher started; by default it is the only one."""

    rank: int = 0
    count: int = 1

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
    count = _number("WORLD_SIZE", os.environ.get("WORLD_SIZE") or "1")
    if count == 1:
        return Launch()
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        advice = "start with torchrun or accelerate launch, or unset WORLD_SIZE"
        raise InputError(f"WORLD_SIZE={count}: {missing[0]} is not set; {advice}")
    rank = _number("RANK", os.environ["RANK"])
    if not 0 <= rank < count:
        raise InputError(f"RANK={rank}: not below WORLD_SIZE={count}; start with torchrun or accelerate launch")
    return Launch(rank, count)


def _number(name: str, text: str) -> int:
    lowest = 1 if name == "WORLD_SIZE" else 0
    if not (text.isascii() and text.isdigit() and int(text) >= lowest):
        raise InputError(f"{name}={text}: is no number of processes; unset it, or start with torchrun")
    return int(text)
