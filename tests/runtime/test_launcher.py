"""What the environment says of several processes is right, or told in a line before anything waits or fails."""

import pytest
import torch

from lib.errors import InputError
from lib.runtime import device, distributed
from lib.runtime.launcher import Launch, launched

RIGHT = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(values: dict[str, str]) -> None:
        for name in (*RIGHT, "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_a_launch_says_where_this_process_stands_on_its_machine(environment):
    environment({**RIGHT, "WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4"})
    assert launched() == Launch(rank=5, count=8, local_rank=1, local_count=4)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("WORLD_SIZE", value) for value in ("9" * 5000, "0", "-1", "\u0663", "two")),
        *(("RANK", value) for value in ("9" * 5000, "-1", "2", "zz")),
        *(("LOCAL_RANK", value) for value in ("9" * 5000, "-1", "zz", "1 ")),
        *(("LOCAL_WORLD_SIZE", value) for value in ("9" * 5000, "0", "zz")),
        *(("MASTER_PORT", value) for value in ("abc", "0", "65536", "99999999")),
    ],
)
def test_a_variable_that_no_launcher_sets_so_is_named(environment, name, value):
    environment({**RIGHT, name: value})
    with pytest.raises(InputError) as told:
        launched()
    assert str(told.value).startswith(f"{name}={value[:20]}") and len(str(told.value)) < 200


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 80])
def test_a_host_that_is_unknown_is_told_before_it_is_waited_for(environment, monkeypatch, host):
    environment({**RIGHT, "MASTER_ADDR": host})
    monkeypatch.setattr("accelerate.PartialState", lambda **_: pytest.fail("waits for the host"))
    with pytest.raises(InputError, match=f"MASTER_ADDR={host}: no such host"):
        distributed.join(torch.device("cpu"))


@pytest.mark.parametrize("values, expected", [({"LOCAL_RANK": "1"}, "cuda"), (RIGHT, "cuda:1")])
def test_only_among_several_processes_the_local_rank_picks_the_gpu(environment, monkeypatch, values, expected):
    environment(values)
    asked = []
    monkeypatch.setattr(device.torch, "zeros", lambda *_, device: asked.append(device) or torch.ones(1))
    device.resolve_device("cuda")
    assert asked == [expected]
