"""The console lines of a healing."""

from collections.abc import Mapping

import torch

from lib.config.healing import Healing
from lib.evaluation.distance import Evaluation
from lib.heal.adapters import SOME, SPARSE, Adapters
from lib.heal.training import Check, Training
from lib.models.decoder import Decoder
from lib.models.limits import dtype_name
from lib.reporting.console import Report


def show_models(report: Report, settings: Healing, decoder: Decoder) -> None:
    size = f"{decoder.total_parameters:,} parameters in {decoder.num_layers} layers"
    report.print(f"Model       {settings.model_name} ({decoder.family}, {dtype_name(decoder.model)}, {decoder.device})")
    report.print(f"            {size}")
    report.print(f"Teacher     {settings.teacher or 'none: it is trained on the text itself'}")


def show_training(
    report: Report, settings: Healing, adapters: Adapters, windows: torch.Tensor, held_out: torch.Tensor, zeros: float
) -> None:
    """What is trained, on which text; and that a sparse model stays one."""
    trained = sum(parameter.numel() for parameter in adapters.parameters())
    report.print()
    report.print(f"Training    {len(adapters)} linears by adapters of rank {settings.rank}, {trained:,} parameters")
    if zeros >= SPARSE:
        report.print(f"            {zeros:.1%} of their weights are zero, and stay so")
    elif zeros >= SOME:
        report.print(
            f"Note        {zeros:.1%} of their weights are zero, too few for a sparse model: they are trained too"
        )
    size = f"{settings.steps:,} steps of {settings.train_batch_size} windows of {windows.shape[1]} tokens"
    report.print(f"            {size}, {settings.dataset}")
    report.print(f"            of {len(windows)} windows; {len(held_out)} others are held out")


def show_check(report: Report, check: Check, settings: Healing) -> None:
    loss = f"loss {check.loss:.4f}, " if check.loss is not None else ""
    held_out = f"{check.held_out_loss:.4f} held out, perplexity there {check.held_out_perplexity:.2f}"
    report.print(f"  step {check.step:>{len(str(settings.steps))}}: {loss}{held_out}")


def show_best(report: Report, training: Training) -> None:
    """Which adapters were taken, and why the training ended before its last step."""
    if training.is_stale and training.step < training.settings.steps:
        report.print("Ended early: the loss held out did not fall any more")
    report.print(f"Taken       the adapters of step {training.best.step}, of lowest loss held out")


def show_evaluations(
    report: Report, found: Mapping[str, Mapping[str, Evaluation]], windows: Mapping[str, torch.Tensor]
) -> None:
    report.print()
    stages = list(next(iter(found.values())))
    about = ", and distance to the dense model" if "dense" in stages else ""
    report.print(f"Perplexity ({' -> '.join(stages)}){about}; ± standard error over windows")
    for text, of_text in found.items():
        size = f"{len(windows[text])} windows of {windows[text].shape[1]} tokens"
        report.print(f"  {text}: {' -> '.join(str(one.perplexity) for one in of_text.values())}  ({size})")
        for stage, one in of_text.items():
            if one.distance:
                report.print(f"    {stage}: {one.distance}")
