"""A model's sensitivities: computed, resumed, or read from a file."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from lib.config.gradients import GradientSettings
from lib.config.sources import ModelSource
from lib.data.sampling import sampled_windows
from lib.models.decoder import Decoder
from lib.models.sealed_tensors import Sealed, broken, save_sealed
from lib.reporting.console import Report
from lib.reporting.environment import environment
from lib.runtime.distributed import ALONE, Ranks
from lib.sensitivity import artifact
from lib.sensitivity.artifact import Artifact
from lib.sensitivity.gradients import LayerSensitivity, connection_sensitivity
from lib.storage.resume_state import State


def gradient_windows(settings: GradientSettings, corpus, tokenizer) -> torch.Tensor:
    """Samples the windows (nsamples, seqlen) on which gradients are computed."""
    return sampled_windows(corpus, tokenizer, settings.nsamples, settings.seqlen, settings.seed)


def state_folder(path: Path) -> Path:
    """The folder of an artifact's resume state, next to it; exists while it is being computed."""
    return path.with_suffix(".state")


@dataclass(frozen=True)
class Sensitivities:
    """A model's sensitivities on some windows (N, T), and the file to write them to."""

    decoder: Decoder
    source: ModelSource
    settings: GradientSettings
    windows: torch.Tensor
    path: Path
    ranks: Ranks = ALONE

    @cached_property
    def key(self) -> dict:
        """Everything the sensitivities depend on; a resume state is bound to it."""
        model, text = artifact.fingerprint(self.decoder), artifact.digest_of(self.windows)
        return {"model": model, "text": text, **asdict(self.settings)}

    def compute(self, report: Report, state: State) -> Artifact:
        """Computes and writes the sensitivities; continues from the resume state."""
        decoder, settings, unfinished = self.decoder, self.settings, _Unfinished(state, self.ranks)
        with report.progress(decoder.num_layers, "gradients") as progress:
            layers = connection_sensitivity(
                decoder, self.windows, settings.gradient_type, settings.loss, progress, self.ranks, unfinished
            )
        model, text = self.key["model"], self.key["text"]
        found = Artifact(self.source.name, model, text, settings, layers, environment(decoder.device))
        if self.ranks.is_first:
            artifact.write(self.path, found)
        return found


class _Unfinished:
    """The progress so far, in one file: the gradient below the last finished layer, and all sensitivities."""

    def __init__(self, state: State, ranks: Ranks):
        self._path, self._ranks = state.folder / "gradient.safetensors", ranks

    def load(self) -> tuple[list[LayerSensitivity], torch.Tensor] | None:
        if not self._ranks.agree(self._path.exists):
            return None
        file = Sealed(self._path)
        try:
            return [artifact.layer_of_json(layer) for layer in file.content], file.tensor("gradient")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise broken(self._path, error) from error

    def save(self, found: list[LayerSensitivity], gradient: torch.Tensor) -> None:
        if self._ranks.is_first:
            save_sealed(self._path, {"gradient": gradient}, [asdict(layer) for layer in found])


def find(path: Path, must_exist: bool, ranks: Ranks = ALONE) -> Artifact | None:
    """Reads an artifact; None if its file is missing and not required. Raises `InputError` like `artifact.read`."""
    if not must_exist and not ranks.agree(path.exists):
        return None
    return artifact.read(path)


def describe(settings: GradientSettings) -> str:
    loss = "the last token's loss" if settings.loss == "last" else "the loss of all tokens"
    windows = f"{settings.nsamples} windows of {settings.seqlen} tokens of {settings.dataset}"
    return f"{settings.gradient_type} of {loss}, {windows}, seed {settings.seed}"
