"""Sensitivities of a model found in a file or computed and kept; the run of `save_gradient.py`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lib import artefact
from lib.allocators import importance
from lib.artefact import Artefact
from lib.data import load_corpus, sampled_windows
from lib.gradients import LayerSensitivity, connection_sensitivity
from lib.inputs import check_tokens, check_whole, dtype_name, window_length
from lib.linears import check_not_offloaded, find_linears
from lib.loading import load_config, load_model, load_outline, load_tokenizer, resolve_device
from lib.methods import GradientSettings
from lib.model import Decoder
from lib.names import short_name
from lib.plots import plot_sensitivity
from lib.report import Report, columns, environment, peak_memory_bytes, quiet_libraries


@dataclass(frozen=True)
class SaveGradient:
    """The settings of a run of `save_gradient.py`."""

    model: str
    gradients: GradientSettings
    output: Path
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    cache_dir: Path | None = None


def run(settings: SaveGradient) -> Artefact:
    """Computes and writes one model's sensitivities. Raises `InputError` and `RunError`."""
    quiet_libraries()
    report = Report()
    gradients = settings.gradients
    with report.timed("load"):
        device = resolve_device(settings.device)
        config = load_config(settings.model, settings.trust_remote_code, settings.cache_dir)
        check_config(settings.model, config, gradients, settings.trust_remote_code)
        tokenizer = load_tokenizer(settings.model, settings.trust_remote_code, settings.cache_dir)
    with report.timed("data"):
        windows = gradient_windows(gradients, settings.model, tokenizer, config.vocab_size)
    with report.timed("load"):
        model = load_model(
            settings.model,
            settings.dtype,
            device,
            settings.device_map,
            settings.trust_remote_code,
            settings.cache_dir,
        )
        decoder = Decoder(model)
        check_not_offloaded(find_linears(decoder))
    report.say(f"Model       {settings.model} ({decoder.family}, {dtype_name(model)}, {decoder.device})")
    report.say(f"Gradients   {describe(gradients)}")
    with report.timed("gradients"):
        found = compute(report, decoder, settings.model, gradients, windows)
    artefact.write(settings.output, found)
    say_importance(report, found.layers)
    report.say()
    gibibytes = peak_memory_bytes(decoder.device) / 2**30
    report.say(f"{report.seconds['gradients']:.1f} s for the gradients; peak memory of the run {gibibytes:.2f} GiB")
    report.say(f"Written     {settings.output}")
    plot = settings.output.with_suffix(".png")
    has_plot = plot_sensitivity(
        plot, importance(found.layers), f"{short_name(settings.model)}: {gradients.gradient_type}"
    )
    report.say(f"            {plot}" if has_plot else "            no plot: matplotlib is not installed")
    return found


def check_config(model: str, config, settings: GradientSettings, trust_remote_code: bool) -> None:
    """Checks what can be without weights. Raises `InputError`."""
    check_whole(model, config)
    window_length(model, config, settings.seqlen, "--grad_seqlen")
    outline = load_outline(config, trust_remote_code)
    if outline is not None:
        find_linears(Decoder(outline, has_weights=False))


def gradient_windows(settings: GradientSettings, model: str, tokenizer, vocab_size: int) -> torch.Tensor:
    """The token windows (nsamples, seqlen) that the gradients are taken on."""
    corpus = load_corpus(settings.dataset, "train")
    windows = sampled_windows(corpus, tokenizer, settings.nsamples, settings.seqlen, settings.seed)
    check_tokens(model, windows, vocab_size)
    return windows


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
