"""Sensitivities of a model: computed, resumed, found in a file."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.config.gradients import GradientSettings
from lib.config.sources import ModelSource
from lib.data.windows import sampled_windows
from lib.errors import START_OVER, InputError
from lib.models.decoder import Decoder
from lib.reporting.console import Report
from lib.reporting.environment import environment
from lib.runtime.distributed import ALONE, Ranks
from lib.sensitivity import artifact
from lib.sensitivity.artifact import Artefact
from lib.sensitivity.gradients import LayerSensitivity, connection_sensitivity
from lib.storage.atomic import clear_drafts, whole_file
from lib.storage.resume_state import State


def gradient_windows(settings: GradientSettings, corpus, tokenizer) -> torch.Tensor:
    """The token windows (nsamples, seqlen) of a corpus that the gradients are taken on."""
    return sampled_windows(corpus, tokenizer, settings.nsamples, settings.seqlen, settings.seed)


def state_folder(path: Path) -> Path:
    """Where what is finished of an artefact is kept, beside it, until all is."""
    return path.with_suffix(".state")


def key_of(decoder: Decoder, settings: GradientSettings, windows: torch.Tensor) -> dict:
    """All that sensitivities depend on."""
    return {"model": artifact.fingerprint(decoder), "text": artifact.digest_of(windows), **asdict(settings)}


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
        artifact.write(path, found)
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
                return [artifact.layer_of_json(layer) for layer in layers], file.get_tensor("gradient").clone()
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}: broken, so that run cannot go on ({error}); {START_OVER}") from error

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
    return artifact.read(path)


def describe(settings: GradientSettings) -> str:
    loss = "the last token's loss" if settings.loss == "last" else "the loss of all tokens"
    windows = f"{settings.nsamples} windows of {settings.seqlen} tokens of {settings.dataset}"
    return f"{settings.gradient_type} of {loss}, {windows}, seed {settings.seed}"
