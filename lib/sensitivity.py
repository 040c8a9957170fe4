"""Sensitivities of a model found in a file or computed and kept; the run of `save_gradient.py`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lib import artefact
from lib.allocators import importance
from lib.artefact import Artefact
from lib.data import load_corpus, sampled_windows
from lib.gradients import LayerSensitivity, connection_sensitivity
from lib.inputs import check_tokens, dtype_name, window_length
from lib.linears import check_not_offloaded, find_linears
from lib.loading import load_config, load_model, load_outline, load_tokenizer, resolve_device
from lib.methods import GradientSettings
from lib.model import Decoder
from lib.names import ModelSource, short_name
from lib.plots import plot_sensitivity
from lib.report import Report, columns, environment, peak_memory_bytes, quiet_libraries


@dataclass(frozen=True)
class SaveGradient:
    """The settings of a run of `save_gradient.py`."""

    source: ModelSource
    gradients: GradientSettings
    output: Path


def run(settings: SaveGradient) -> Artefact:
    """Computes and writes one model's sensitivities. Raises `InputError` and `RunError`."""
    quiet_libraries()
    report = Report()
    source, gradients = settings.source, settings.gradients
    with report.timed("load"):
        resolve_device(source.device)
        config = load_config(source)
        check_config(source, config, gradients)
        tokenizer = load_tokenizer(source)
    with report.timed("data"):
        windows = gradient_windows(gradients, load_corpus(gradients.dataset, "train"), tokenizer)
        check_tokens(source.name, windows, config.vocab_size)
    with report.timed("load"):
        decoder = Decoder(load_model(source))
        check_not_offloaded(find_linears(decoder))
    report.say(f"Model       {source.name} ({decoder.family}, {dtype_name(decoder.model)}, {decoder.device})")
    report.say(f"Gradients   {describe(gradients)}")
    with report.timed("gradients"):
        found = compute(report, decoder, source.name, gradients, windows)
    say_importance(report, found.layers)
    write(report, settings, found, peak_memory_bytes(decoder.device))
    return found


def write(report: Report, settings: SaveGradient, found: Artefact, peak_bytes: int) -> None:
    """Writes the artefact and its plot, and says so."""
    artefact.write(settings.output, found)
    report.say()
    seconds = report.seconds["gradients"]
    report.say(f"{seconds:.1f} s for the gradients; peak memory of the run {peak_bytes / 2**30:.2f} GiB")
    report.say(f"Written     {settings.output}")
    plot = settings.output.with_suffix(".png")
    title = f"{short_name(settings.source.name)}: {settings.gradients.gradient_type}"
    has_plot = plot_sensitivity(plot, importance(found.layers), title)
    report.say(f"            {plot}" if has_plot else "            no plot: matplotlib is not installed")


def check_config(source: ModelSource, config, settings: GradientSettings) -> None:
    """Checks what can be without weights. Raises `InputError`."""
    window_length(source.name, config, settings.seqlen, "--grad_seqlen")
    outline = load_outline(config, source.trust_remote_code)
    if outline is not None:
        find_linears(Decoder(outline, has_weights=False))


def gradient_windows(settings: GradientSettings, corpus, tokenizer) -> torch.Tensor:
    """The token windows (nsamples, seqlen) of a corpus that the gradients are taken on."""
    return sampled_windows(corpus, tokenizer, settings.nsamples, settings.seqlen, settings.seed)


def compute(
    report: Report, decoder: Decoder, model: str, settings: GradientSettings, windows: torch.Tensor
) -> Artefact:
    """The sensitivities of all layers, with what they were made from."""
    with report.progress(decoder.num_layers, "gradients") as progress:
        layers = connection_sensitivity(decoder, windows, settings.gradient_type, settings.loss, progress)
    return Artefact(
        model,
        artefact.fingerprint(decoder),
        artefact.digest_of(windows),
        settings,
        layers,
        environment(decoder.device),
    )


def find(path: Path, must_exist: bool) -> Artefact | None:
    """The artefact in a file; None when it is not there and need not be.

    Raises `InputError` for a file that is broken.
    """
    if not must_exist and not path.exists():
        return None
    return artefact.read(path)


def describe(settings: GradientSettings) -> str:
    loss = "the last token's loss" if settings.loss == "last" else "the loss of all tokens"
    windows = f"{settings.nsamples} windows of {settings.seqlen} tokens of {settings.dataset}"
    return f"{settings.gradient_type} of {loss}, {windows}, seed {settings.seed}"


def say_importance(report: Report, layers: list[LayerSensitivity]) -> None:
    report.say()
    report.say("Importance by layer (1 - share of the redundancy)")
    for row in columns([f"{layer}: {score:.4f}" for layer, score in enumerate(importance(layers))], 6):
        report.say("  " + row)
