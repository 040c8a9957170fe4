"""The run of `save_gradient.py`: compute a model's sensitivities and write them to a file."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.config.gradients import GradientSettings
from lib.config.snapshot import Snapshot
from lib.config.sources import ModelSource, short_name
from lib.data.corpora import load_corpus
from lib.data.inspection import describe_texts
from lib.engine.own_text import check_not_on_disk
from lib.errors import InputError
from lib.models.decoder import Decoder
from lib.models.limits import check_tokens, dtype_name, window_length
from lib.models.loading import load_config, load_model, load_outline, load_tokenizer
from lib.models.matrices import check_not_offloaded, find_matrices
from lib.reporting.console import Report, columns
from lib.reporting.plots import plot_sensitivity
from lib.runtime.device import resolve_device
from lib.runtime.distributed import join
from lib.runtime.memory import peak_memory_bytes
from lib.runtime.setup import set_up
from lib.sensitivity import artifact
from lib.sensitivity.artifact import Artifact
from lib.sensitivity.compute import Sensitivities, add_own_text, describe, gradient_windows, inputs, state_folder
from lib.sensitivity.gradients import LayerSensitivity, importance
from lib.storage.resume_state import State, read
from lib.storage.state_folder import discard
from lib.version import code_version

_ADVICE = "name another --output, or replace the file with --overwrite"


@dataclass(frozen=True)
class SaveGradient:
    """The settings of a `save_gradient.py` run."""

    source: ModelSource
    gradients: GradientSettings
    output: Path
    overwrite: bool = False
    resume: bool = False

    @property
    def plot(self) -> Path:
        """The plot's path, next to the artifact."""
        return self.output.with_suffix(".png")


def run(settings: SaveGradient) -> Artifact:
    """Computes and writes one model's sensitivities. Raises `InputError` and `RunError`."""
    set_up()
    source, gradients = settings.source, settings.gradients
    ranks = join(resolve_device(source.device))
    report = Report(ranks.is_first)
    with report.timed("snapshot"):
        code_version()
        snapshot = Snapshot.take(inputs(source, gradients), ranks.agree, report.print)
    with report.timed("load"):
        config = load_config(source)
        check_config(source, config, gradients)
        tokenizer = load_tokenizer(source)
    with report.timed("data"):
        corpora = {text: load_corpus(text, "train", tokenizer) for text in gradients.dataset.read}
        for line in describe_texts(list(corpora.values()), ()):
            report.print(line)
        windows = gradient_windows(gradients, corpora, tokenizer)
        check_tokens(source.name, windows, config.vocab_size)
    with report.timed("load"):
        decoder = Decoder(load_model(source))
        check_not_offloaded(decoder, find_matrices(decoder))
        if gradients.dataset.is_sampled:
            check_not_on_disk(decoder)
    add_own_text(report, windows, tokenizer, decoder, gradients.seed, ranks)
    folder = state_folder(settings.output)
    with report.timed("fingerprint"):
        fingerprint = ranks.agree(partial(artifact.fingerprint, decoder))
    wanted = Sensitivities(decoder, source, gradients, windows, settings.output, fingerprint, snapshot, ranks)
    if settings.resume and (before := finished(settings, wanted)):
        report.print(f"Finished before: {settings.output}")
        if ranks.is_first:  # may be left over, and the plot missing, after a kill at the very end
            discard(folder)
            if not settings.plot.exists():
                draw(settings, before)
        return before
    state = State(folder, wanted.key, ranks, settings.resume)
    with state.advise_resume("the same command with --resume goes on"), state.session(report.seconds):
        report.print(f"Model       {source.name} ({decoder.family}, {dtype_name(decoder.model)}, {decoder.device})")
        report.print(f"Gradients   {describe(gradients)}")
        with report.timed("gradients"):
            found = wanted.compute(report, state)
        show_importance(report, found.layers)
        if report.is_first:
            show_written(report, settings, found, peak_memory_bytes(decoder.device))
    return found


def finished(settings: SaveGradient, wanted: Sensitivities) -> Artifact | None:
    """The artifact of an earlier run that has what is wanted now; None if there is none.

    Raises `InputError` if the artifact has other settings, text or model, unless this run will overwrite it, because of
    `overwrite` or because it resumes.
    """
    ranks, decoder = wanted.ranks, wanted.decoder
    if not ranks.agree(settings.output.exists):
        return None
    try:
        found = artifact.read(settings.output)
        artifact.check_settings(found, settings.output, settings.gradients, wanted.windows, _ADVICE)
        artifact.check_model(found, settings.output, settings.source.name, decoder, wanted.fingerprint, _ADVICE)
        return found
    except InputError:
        if settings.overwrite or ranks.agree(lambda: read(state_folder(settings.output)) is not None):
            return None
        raise


def show_written(report: Report, settings: SaveGradient, found: Artifact, peak_bytes: int) -> None:
    """Draws the plot and prints what was written."""
    report.print()
    seconds = report.seconds.get("gradients", 0.0)
    report.print(f"{seconds:.1f} s for the gradients; peak memory of the run {peak_bytes / 2**30:.2f} GiB")
    report.print(f"Written     {settings.output}")
    report.print(f"            {draw(settings, found) or settings.plot}")


def draw(settings: SaveGradient, found: Artifact) -> str | None:
    """Draws the plot of an artifact; returns why there is none, if so."""
    title = f"{short_name(settings.source.name)}: {settings.gradients.gradient_type}"
    return plot_sensitivity(settings.plot, importance(found.layers), title)


def check_config(source: ModelSource, config, settings: GradientSettings) -> None:
    """Runs the checks that need no weights. Raises `InputError`."""
    window_length(source.name, config, settings.seqlen, "--grad_seqlen")
    outline = load_outline(config, source.trust_remote_code)
    if outline is not None:
        find_matrices(Decoder(outline, has_weights=False))


def show_importance(report: Report, layers: list[LayerSensitivity]) -> None:
    report.print()
    report.print("Importance by layer (1 - share of the redundancy)")
    for row in columns([f"{layer}: {score:.4f}" for layer, score in enumerate(importance(layers))], 6):
        report.print("  " + row)
