"""What pruning changed in a weight is kept to the bit, written by a thread, and refused when it is broken."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from lib.errors import InputError, RunError
from lib.models import weight_deltas
from lib.models.sealed_tensors import save_sealed
from lib.models.weight_deltas import Changes, difference, zeroed, zeros_of


def test_a_weight_that_only_lost_elements_is_kept_in_bits(tmp_path):
    old = torch.randn(7, 13)
    new = old.masked_fill(torch.rand(7, 13) < 0.5, 0)
    Changes(tmp_path).write(0, {"lost": difference(old, new), "other": difference(old, new * 1.5)})
    (path,) = tmp_path.glob("*.safetensors")
    kept = load_file(path)
    assert kept["zeros.lost"].dtype == torch.uint8 and kept["zeros.lost"].numel() == 12
    assert torch.equal(kept["weight.other"], new * 1.5)
    assert torch.equal(Changes(tmp_path).apply(0, "lost", old), new)
    assert torch.equal(Changes(tmp_path).apply(0, "other", old), new * 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_change_is_told_from_lost_elements_to_the_bit(dtype):
    """-0.0 is another number than 0.0, and what is no number is equal to itself."""
    old = torch.tensor([[0.0, -0.0, torch.nan, 1.0, -2.0]], dtype=dtype)
    for new, is_masked in (
        ([0.0, -0.0, torch.nan, 1.0, -2.0], True),
        ([0.0, 0.0, 0.0, 1.0, 0.0], True),
        ([0.0, -0.0, torch.nan, 1.0, -0.0], False),
        ([-0.0, -0.0, torch.nan, 1.0, -2.0], False),
        ([0.0, -0.0, torch.nan, 1.5, -2.0], False),
    ):
        assert bool(difference(old, torch.tensor([new], dtype=dtype)).is_masked) == is_masked, new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_zeroed_is_masked_fill_to_the_bit(dtype):
    """Also for what is no finite number, for the sign of zeros, and for a view that is not contiguous."""
    weight = torch.randn(6, 8, dtype=dtype)
    weight[0] = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, -1.0, 65504, 1e-7])
    for one in (weight, weight.T, weight[:, 2:5]):
        mask = torch.rand(one.shape) < 0.5
        assert bool(difference(one.masked_fill(mask, 0), zeroed(one, mask)).is_masked)
        assert torch.equal(zeros_of(zeroed(one, mask)), zeros_of(one.masked_fill(mask, 0)))


def one_change() -> dict:
    return {"q.weight": difference(torch.ones(4, 4), torch.zeros(4, 4))}


def test_a_layer_is_written_while_the_next_one_is_worked_on(tmp_path, monkeypatch):
    """One at a time: the write of the next layer waits for it, and so do a read and the end of the block."""
    may_write, written = threading.Event(), []

    def save(path, *args):
        assert may_write.wait(60)
        written.append(path.name)
        return save_sealed(path, *args)

    monkeypatch.setattr(weight_deltas, "save_sealed", save)
    with Changes(tmp_path) as changes:
        changes.write(0, one_change())
        assert not written and 0 in changes
        may_write.set()
        changes.write(1, one_change())
        assert written[0] == "layer-00000.safetensors"
        assert torch.equal(changes.apply(1, "q.weight", torch.ones(4, 4)), torch.zeros(4, 4)) and len(written) == 2
        changes.write(2, one_change())
    assert len(written) == 3 and all(layer in Changes(tmp_path) for layer in range(3))


@pytest.mark.parametrize("at", ["the next layer", "the end", "another error"])
def test_a_layer_that_could_not_be_written_ends_the_run(at, tmp_path, monkeypatch):
    def fail(*args):
        raise RunError("the disk is full")

    monkeypatch.setattr(weight_deltas, "save_sealed", fail)
    kind = KeyboardInterrupt if at == "another error" else RunError
    with pytest.raises(kind), Changes(tmp_path) as changes:
        changes.write(0, one_change())
        if at == "the next layer":
            changes.write(1, one_change())
            raise AssertionError("not reached")
        if at == "another error":
            raise KeyboardInterrupt


def test_broken_changes_are_refused(tmp_path):
    changes = Changes(tmp_path)
    changes.write(0, {"q.weight": difference(torch.ones(4, 4), torch.zeros(4, 4))})
    assert 0 in Changes(tmp_path) and 1 not in Changes(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="layer-00000.safetensors: broken"):
        Changes(tmp_path)
