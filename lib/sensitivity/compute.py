"""A model's sensitivities: computed, resumed, or read from a file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from lib.config.gradients import GradientSettings
from lib.config.keys import code_digest
from lib.config.mixture import Mixture
from lib.config.snapshot import MODEL, TEXT, Input, Snapshot
from lib.config.sources import ModelSource
from lib.data.inspection import describe_own_text
from lib.data.recognition import Corpus
from lib.data.sampling import draw_parts, sampled_windows, unsampled
from lib.engine.own_text import sample_windows
from lib.errors import one_line
from lib.models.decoder import Decoder
from lib.models.sealed_tensors import Sealed, broken, save_sealed
from lib.reporting.console import Report
from lib.reporting.environment import environment
from lib.runtime.distributed import ALONE, Ranks
from lib.sensitivity import artifact
from lib.sensitivity.artifact import Artifact
from lib.sensitivity.gradients import LayerSensitivity, connection_sensitivity
from lib.storage.resume_state import State


def gradient_windows(settings: GradientSettings, corpora: Mapping[str, Corpus], tokenizer) -> torch.Tensor:
    """Draws the windows (nsamples, seqlen) that gradients are computed on; `add_own_text` adds the model's own."""
    nsamples, seqlen, seed = settings.nsamples, settings.seqlen, settings.seed
    parts = draw_parts(settings.dataset, corpora, tokenizer, nsamples, seqlen, seed, sampled_windows)
    return torch.cat(list(parts.values()))


def add_own_text(report: Report, windows: torch.Tensor, tokenizer, decoder: Decoder, seed: int, ranks: Ranks) -> None:
    """Puts the model's own text, in place, into the windows (N, T) that are `unsampled`.

    They are few and short, so that a resumed run samples them again.
    """
    rows = unsampled(windows)
    if rows.any():
        with report.timed("sample"):
            windows[rows] = sample_windows(decoder, windows[rows, 0], windows.shape[1], seed, ranks)
        report.print(describe_own_text(windows[rows], tokenizer, "gradients"))


def state_folder(path: Path) -> Path:
    """The folder of an artifact's resume state, next to it; exists while it is being computed."""
    return path.with_suffix(".state")


def inputs(source: ModelSource, settings: GradientSettings) -> list[Input]:
    """What is read: the model and the texts."""
    return [(MODEL, source.name), *((TEXT, text) for text in settings.dataset.read)]


@dataclass(frozen=True)
class Sensitivities:
    """A model's sensitivities on some windows (N, T), and the file to write them to.

    `snapshot`: of the model and the text, as they were before they were read.
    """

    decoder: Decoder
    source: ModelSource
    settings: GradientSettings
    windows: torch.Tensor
    path: Path
    fingerprint: str
    snapshot: Snapshot
    ranks: Ranks = ALONE

    @cached_property
    def key(self) -> dict:
        """Everything the sensitivities depend on; a resume state is bound to it."""
        text = artifact.digest_of(self.windows)
        return {"code": code_digest(), "model": self.fingerprint, "text": text, **asdict(self.settings)}

    def compute(self, report: Report, state: State) -> Artifact:
        """Computes and writes the sensitivities; continues from the resume state.

        Raises `InputsChanged` when the model or the text was changed meanwhile.
        """
        decoder, settings, unfinished = self.decoder, self.settings, _Unfinished(state, self.ranks)
        with report.progress(decoder.num_layers, "gradients") as progress:
            layers = connection_sensitivity(
                decoder, self.windows, settings.gradient_type, settings.loss, progress, self.ranks, unfinished
            )
        text, named = self.key["text"], replace(settings, dataset=Mixture.of(one_line(str(settings.dataset))))
        model, where = one_line(self.source.name), environment(decoder.device)
        found = Artifact(model, self.fingerprint, text, named, layers, where)
        if self.ranks.is_first:
            self.snapshot.check(inputs(self.source, settings))
            artifact.write(self.path, found)
        return found


class _Unfinished:
    """The progress so far, in one file: the gradient below the last finished layer, and all sensitivities."""

    def __init__(self, state: State, ranks: Ranks):
        self._path, self._owner, self._ranks = state.folder / "gradient.safetensors", state.key, ranks

    def load(self) -> tuple[list[LayerSensitivity], torch.Tensor] | None:
        if not self._ranks.agree(self._path.exists):
            return None
        file = Sealed(self._path, self._owner)
        try:
            return [artifact.layer_of_json(layer) for layer in file.content], file.tensor("gradient")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise broken(self._path, error) from error

    def save(self, found: list[LayerSensitivity], gradient: torch.Tensor) -> None:
        if self._ranks.is_first:
            save_sealed(self._path, {"gradient": gradient}, self._owner, [asdict(layer) for layer in found])


def find(path: Path, must_exist: bool, ranks: Ranks = ALONE) -> Artifact | None:
    """Reads an artifact; None if its file is missing and not required. Raises `InputError` like `artifact.read`."""
    if not must_exist and not ranks.agree(path.exists):
        return None
    return artifact.read(path)


def describe(settings: GradientSettings) -> str:
    loss = "the last token's loss" if settings.loss == "last" else "the loss of all tokens"
    windows = f"{settings.nsamples} windows of {settings.seqlen} tokens of {settings.dataset}"
    return f"{settings.gradient_type} of {loss}, {windows}, seed {settings.seed}"
