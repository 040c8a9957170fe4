"""Training goes down the gradient of the distance to the dense model, keeps the best, and goes on after a stop."""

import copy

import pytest
import torch

import lib.heal.training
from lib.errors import InputError, RunError
from lib.heal.adapters import Adapters, find_linears
from lib.heal.training import PATIENCE, Settings, Training, rate, rows_of, split
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher
from tests.families import tiny_model

SETTINGS = Settings(steps=24, batch_size=4, learning_rate=0.005, seed=0)
WINDOWS = torch.randint(3, 96, (64, 16), generator=torch.Generator().manual_seed(0))


def training(
    settings: Settings = SETTINGS, has_teacher: bool = True, batch_size: int = 2, family: str = "Llama"
) -> Training:
    """That of a model without an FFN, towards the whole one."""
    teacher = Decoder(tiny_model(family).requires_grad_(False))
    student = Decoder(copy.deepcopy(teacher.model))
    for linear in (one for (layer, path), one in find_linears(student).items() if layer == 1 and "mlp" in path):
        linear.weight.data.zero_()
    adapters = Adapters(find_linears(student), 4, keeps_zeros=False, seed=settings.seed)
    windows, held_out = split(WINDOWS)
    return Training(
        student, teacher if has_teacher else None, adapters, windows, held_out, settings, Batcher(batch_size)
    )


def trained(one: Training, keep=lambda: None) -> Training:
    one.run(keep, lambda check: None, lambda count: None)
    return one


@pytest.mark.parametrize("has_teacher", [True, False])
def test_the_loss_is_the_divergence_from_the_teacher_or_that_of_the_text(has_teacher):
    one = training(has_teacher=has_teacher)
    loss = one._accumulate(WINDOWS[:20])
    logits = one.student.model(input_ids=WINDOWS[:20]).logits[:, :-1].log_softmax(-1)
    if has_teacher:
        dense = one.teacher.model(input_ids=WINDOWS[:20]).logits[:, :-1].log_softmax(-1)
        expected = torch.nn.functional.kl_div(logits, dense, log_target=True, reduction="none").sum(-1).mean()
    else:
        expected = -logits.gather(-1, WINDOWS[:20, 1:, None]).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(expected, one.parameters)
    for parameter, gradient in zip(one.parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-7, rtol=1e-4)


def test_a_step_is_the_same_in_batches_of_any_size_and_when_memory_runs_out(monkeypatch):
    whole, parts, halved = training(batch_size=4), training(batch_size=1), training(batch_size=4)
    calls, forward = [], halved.student.model.forward

    def fails_at_first(*args, **kwargs):
        calls.append(1)
        if len(calls) <= 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(halved.student.model, "forward", fails_at_first)
    for one in (whole, parts, halved):
        one._take_step()
    assert halved.batcher.size == 1 and len(calls) == 2 + 4
    for other in (parts, halved):
        for left, right in zip(whole.parameters, other.parameters, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-3)


def test_training_comes_nearer_to_the_teacher_and_keeps_the_best():
    one = trained(training())
    assert one.step == 24 and [check.step for check in one.checks] == list(range(0, 25, 3))
    assert one.best.held_out_loss < 0.92 * one.checks[0].held_out_loss
    one.checks = []
    one._check(lambda check: None)
    assert one.checks[0].held_out_loss == pytest.approx(trained(training()).best.held_out_loss, rel=1e-6)


def test_training_ends_when_the_held_out_loss_has_not_fallen_for_a_while():
    one = trained(training(SETTINGS._replace(learning_rate=3.0)))
    assert one.is_stale and one.step < 24
    assert one.checks.index(one.best) == len(one.checks) - 1 - PATIENCE


def test_a_training_that_only_harms_changes_nothing():
    one = trained(training(SETTINGS._replace(learning_rate=3.0)))
    assert one.best.step == 0 and not any(up.any() for up in one.parameters[1::2])


@pytest.mark.parametrize("at", [1, 2, 7, 24])
def test_a_training_goes_on_as_if_it_had_not_been_stopped(at, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.heal.training, "_KEPT_EVERY", 0)  # seconds
    path, whole, first, second = tmp_path / "kept.safetensors", trained(training()), training(), training()

    def keep() -> None:
        first.save(path, "mine")
        if first.step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(first, keep)
    second.restore(path, "mine")
    assert second.step == at
    trained(second)
    assert second.checks == whole.checks and second.step == whole.step == 24
    for left, right in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(left, right)
    with pytest.raises(InputError, match="broken, so that run cannot go on"):
        training().restore(path, "another's")


def test_a_loss_that_is_not_finite_ends_the_training():
    one = training()
    one.parameters[1].data.fill_(float("nan"))
    with pytest.raises(RunError, match="step 0 of the training: the loss is not finite"):
        trained(one)
    one = training()
    one.parameters[1].data.fill_(float("nan"))
    with pytest.raises(RunError, match="step 1 of the training: its loss or gradient is not finite"):
        one._take_step()


def test_every_window_is_taken_once_before_any_is_taken_again():
    taken = [row for step in range(10) for row in rows_of(step, 20, 4, seed=3)]
    assert sorted(taken[:20]) == sorted(taken[20:]) == list(range(20)) and taken[:20] != taken[20:]
    assert taken != [row for step in range(10) for row in rows_of(step, 20, 4, seed=4)]


def test_the_learning_rate_rises_and_falls():
    rates = [rate(step, 300) for step in range(300)]
    assert rates[0] < 0.1 and max(rates) == rates[10] > 0.99 and rates[-1] < 1e-4
    assert rate(0, 1) == 1.0


@pytest.mark.parametrize("count, expected", [(2, 1), (16, 2), (20, 2), (2000, 16)])
def test_some_windows_are_held_out_of_the_training(count, expected):
    windows = torch.arange(count)[:, None]
    rest, held_out = split(windows)
    assert len(held_out) == expected
    assert sorted(torch.cat([rest, held_out]).flatten().tolist()) == list(range(count))
