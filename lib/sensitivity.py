"""Sensitivities of a model found in a file or computed and kept; the run of `save_gradient.py`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib import artefact
from lib.allocators import importance
from lib.artefact import Artefact
from lib.config.gradients import GradientSettings
from lib.config.sources import ModelSource, short_name
from lib.data.corpora import load_corpus
from lib.data.windows import sampled_windows
from lib.errors import ANEW, InputError
from lib.files import clear_drafts, whole_file
from lib.gradients import LayerSensitivity, connection_sensitivity
from lib.models.decoder import Decoder
from lib.models.limits import check_tokens, dtype_name, window_length
from lib.models.linears import check_not_offloaded, find_linears
from lib.models.loading import load_config, load_model, load_outline, load_tokenizer
from lib.reporting.console import Report, columns
from lib.reporting.environment import environment
from lib.reporting.plots import plot_sensitivity
from lib.runtime.device import resolve_device
from lib.runtime.distributed import ALONE, Ranks, join
from lib.runtime.memory import peak_memory_bytes
from lib.runtime.setup import set_up
from lib.state import State, discard, read


@dataclass(frozen=True)
class SaveGradient:
    """The settings of a run of `save_gradient.py`."""

    source: ModelSource
    gradients: GradientSettings
    output: Path
    overwrite: bool = False
    resume: bool = False

    @property
    def plot(self) -> Path:
        """Where the plot is, beside the artefact."""
        return self.output.with_suffix(".png")


def run(settings: SaveGradient) -> Artefact:
    """Computes and writes one model's sensitivities. Raises `InputError` and `RunError`."""
    set_up()
    source, gradients = settings.source, settings.gradients
    ranks = join(resolve_device(source.device))
    report = Report(ranks.is_first)
    with report.timed("load"):
        config = load_config(source)
        check_config(source, config, gradients)
        tokenizer = load_tokenizer(source)
    with report.timed("data"):
        windows = gradient_windows(gradients, load_corpus(gradients.dataset, "train"), tokenizer)
        check_tokens(source.name, windows, config.vocab_size)
    with report.timed("load"):
        decoder = Decoder(load_model(source))
        check_not_offloaded(decoder, find_linears(decoder))
    folder = state_folder(settings.output)
    if settings.resume and (before := finished(settings, windows, decoder, ranks)):
        report.say(f"Finished before: {settings.output}")
        if ranks.is_first:  # what is left, or lacks, when a run is killed as it ends
            discard(folder)
            if not settings.plot.exists():
                draw(settings, before)
        return before
    key = key_of(decoder, gradients, windows)
    state = State(folder, key, ranks, settings.resume)
    with state.told("the same command with --resume goes on"), state.at_work(report.seconds):
        report.say(f"Model       {source.name} ({decoder.family}, {dtype_name(decoder.model)}, {decoder.device})")
        report.say(f"Gradients   {describe(gradients)}")
        with report.timed("gradients"):
            found = compute(report, decoder, source, gradients, windows, settings.output, state, key, ranks)
        say_importance(report, found.layers)
        if report.is_first:
            say_written(report, settings, found, peak_memory_bytes(decoder.device))
    return found


def finished(settings: SaveGradient, windows: torch.Tensor, decoder: Decoder, ranks: Ranks) -> Artefact | None:
    """The artefact of a run, if it is there; else None.

    Raises `InputError` for an artefact of other settings, text or another model, unless it is to be overwritten, as it
    is too by a run that was stopped.
    """
    if not ranks.agree(settings.output.exists):
        return None
    try:
        found = artefact.read(settings.output)
        artefact.check_settings(found, settings.output, settings.gradients, windows)
        artefact.check_model(found, settings.output, settings.source.name, decoder)
        return found
    except InputError:
        if settings.overwrite or ranks.agree(lambda: read(state_folder(settings.output)) is not None):
            return None
        raise


def say_written(report: Report, settings: SaveGradient, found: Artefact, peak_bytes: int) -> None:
    """Draws the plot, and says what was written."""
    report.say()
    seconds = report.seconds.get("gradients", 0.0)
    report.say(f"{seconds:.1f} s for the gradients; peak memory of the run {peak_bytes / 2**30:.2f} GiB")
    report.say(f"Written     {settings.output}")
    has_plot = draw(settings, found)
    report.say(f"            {settings.plot}" if has_plot else "            no plot: matplotlib is not installed")


def draw(settings: SaveGradient, found: Artefact) -> bool:
    """Draws the plot of an artefact; False without matplotlib."""
    title = f"{short_name(settings.source.name)}: {settings.gradients.gradient_type}"
    return plot_sensitivity(settings.plot, importance(found.layers), title)


def check_config(source: ModelSource, config, settings: GradientSettings) -> None:
    """Checks what can be without weights. Raises `InputError`."""
    window_length(source.name, config, settings.seqlen, "--grad_seqlen")
    outline = load_outline(config, source.trust_remote_code)
    if outline is not None:
        find_linears(Decoder(outline, has_weights=False))


def gradient_windows(settings: GradientSettings, corpus, tokenizer) -> torch.Tensor:
    """The token windows (nsamples, seqlen) of a corpus that the gradients are taken on."""
    return sampled_windows(corpus, tokenizer, settings.nsamples, settings.seqlen, settings.seed)


def state_folder(path: Path) -> Path:
    """Where what is finished of an artefact is kept, beside it, until all is."""
    return path.with_suffix(".state")


def key_of(decoder: Decoder, settings: GradientSettings, windows: torch.Tensor) -> dict:
    """All that sensitivities depend on."""
    return {"model": artefact.fingerprint(decoder), "text": artefact.digest_of(windows), **asdict(settings)}


def compute(
    report: Report,
    decoder: Decoder,
    source: ModelSource,
    settings: GradientSettings,
    windows: torch.Tensor,
    path: Path,
    state: State,
    key: dict,
    ranks: Ranks = ALONE,
) -> Artefact:
    """The sensitivities of all layers, with what they were made from, written to `path`; goes on with the state.

    `key` is that of `key_of`, to which the state is bound.
    """
    with report.progress(decoder.num_layers, "gradients") as progress:
        layers = connection_sensitivity(
            decoder, windows, settings.gradient_type, settings.loss, progress, ranks, _Unfinished(state, ranks)
        )
    found = Artefact(source.name, key["model"], key["text"], settings, layers, environment(decoder.device))
    if ranks.is_first:
        if state.folder == state_folder(path):  # which no other run works on
            clear_drafts(path)
        artefact.write(path, found)
    return found


class _Unfinished:
    """The last finished layer of a state: a file with the gradient below it, and with all sensitivities so far."""

    def __init__(self, state: State, ranks: Ranks):
        self._path, self._ranks = state.folder / "gradient.safetensors", ranks

    def load(self) -> tuple[list[LayerSensitivity], torch.Tensor] | None:
        if not self._ranks.agree(self._path.exists):
            return None
        try:
            with safe_open(self._path, framework="pt") as file:
                layers = json.loads(file.metadata()["layers"])
                return [artefact.layer_of_json(layer) for layer in layers], file.get_tensor("gradient").clone()
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}: broken, so that run cannot go on ({error}); {ANEW}") from error

    def save(self, found: list[LayerSensitivity], gradient: torch.Tensor) -> None:
        if self._ranks.is_first:
            metadata = {"layers": json.dumps([asdict(layer) for layer in found])}
            with whole_file(self._path) as draft:
                save_file({"gradient": gradient}, draft, metadata)


def find(path: Path, must_exist: bool, ranks: Ranks = ALONE) -> Artefact | None:
    """The artefact in a file; None when it is not there and need not be.

    Raises `InputError` for a file that is broken.
    """
    if not must_exist and not ranks.agree(path.exists):
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
