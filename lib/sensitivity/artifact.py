"""The artifact: a small JSON file of a model's connection sensitivities, bound to the weights they come from."""

import hashlib
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.config.gradients import FORMAT, GRADIENT_LOSSES, GRADIENT_TYPES, GradientSettings, is_content_of_ours, is_ours
from lib.config.mixture import Mixture
from lib.errors import InputError, first_line
from lib.files import digest_of_json, read_json
from lib.models.decoder import Decoder
from lib.models.matrices import find_matrices
from lib.sensitivity.gradients import LayerSensitivity, Spread
from lib.storage.atomic import write_json

_PIECE = 2**26  # elements that are copied at once to be hashed
_THREADS = 4  # a digest is computed without the interpreter's lock
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map")  # in a config
_FIELDS = {"model": str, "fingerprint": str, "text": str, "settings": dict, "layers": list, "environment": dict}
_SETTINGS = {"dataset": str, "nsamples": int, "seqlen": int, "loss": str, "gradient_type": str, "seed": int}


@dataclass(frozen=True)
class Artifact:
    """The sensitivities of a model's layers, and what they were computed from."""

    model: str
    fingerprint: str
    text: str  # digest of the windows
    settings: GradientSettings
    layers: list[LayerSensitivity]
    environment: dict


# What it is bound to --------------------------------------------------------------------------------------------------


def fingerprint(decoder: Decoder) -> str:
    """A digest of what a model computes: its config, the code that came with it, and every value of its weights."""
    model = decoder.model
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_THE_MODEL}
    digest = hashlib.sha256(f"{decoder.family} {json.dumps(config, sort_keys=True, default=str)}".encode())
    digest.update(_own_code(type(model)))
    layer_of = {module: index for index, layer in enumerate(decoder.layers) for module in layer.modules()}
    places = [(path, module, name) for path, module in model.named_modules() for name in _weights_of(module)]
    known: set[int] = set()  # tied weights count once
    with ThreadPoolExecutor(_THREADS) as pool:
        for layer, of_layer in groupby(places, key=lambda place: layer_of.get(place[1])):
            with decoder.at(layer) if layer is not None else nullcontext():
                weights = {f"{path}.{name}".lstrip("."): _weights_of(module)[name] for path, module, name in of_layer}
                if layer is None:
                    weights = {path: weight for path, weight in weights.items() if id(weight) not in known}
                    known |= {id(weight) for weight in weights.values()}
                for one in pool.map(_digest_of_weight, weights, weights.values()):
                    digest.update(one)
    return digest.hexdigest()


def _weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers of a module itself."""
    kept = {name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return {name: tensor for name, tensor in {**module._parameters, **kept}.items() if tensor is not None}


def _digest_of_weight(path: str, weight: torch.Tensor) -> bytes:
    """A digest of a weight's name, shape, dtype and values, read in pieces."""
    digest = hashlib.sha256(f"{path} {tuple(weight.shape)} {weight.dtype}".encode())
    for piece in weight.detach().reshape(-1).split(_PIECE):
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()


def _own_code(kind: type) -> bytes:
    """The source of a class that came with a checkpoint: in other code the same weights are another model."""
    module = sys.modules[kind.__module__]
    return Path(str(module.__file__)).read_bytes() if module.__name__.startswith("transformers_modules.") else b""


def digest_of(windows: torch.Tensor) -> str:
    """A digest of token windows (N, T)."""
    return hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.cpu().numpy().tobytes()).hexdigest()


# The file -------------------------------------------------------------------------------------------------------------


def write(path: Path, artifact: Artifact) -> None:
    """Writes the file atomically; creates its folder. Raises `InputError` where another kind of file stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not is_ours(path):
        raise InputError(f"gradients {path}: is no file of gradients, and is not replaced; name another")
    content = asdict(artifact) | {"settings": artifact.settings.as_json()}
    write_json(path, {"format": FORMAT, "digest": digest_of_json(content), **content})


def read(path: Path) -> Artifact:
    """Reads the file. Raises `InputError` if it is missing, broken, or of another kind."""
    try:
        content = read_json(path)
        if not is_content_of_ours(content):
            raise ValueError("another kind of file")
    except FileNotFoundError as error:
        raise InputError(f"gradients {path}: no such file; make it with save_gradient.py") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        advice = "give a file of save_gradient.py, or move this one away"
        raise InputError(f"gradients {path}: holds no gradients ({reason}); {advice}") from error
    try:
        return _of_json(content)
    except (ValueError, RecursionError) as error:
        advice = "make it again with save_gradient.py --overwrite, or delete it"
        raise InputError(f"gradients {path}: broken ({error}); {advice}") from error


def _of_json(content: dict) -> Artifact:
    """The inverse of `asdict`. Raises `ValueError` for what no run writes."""
    if content.pop("format") != FORMAT:
        raise ValueError("of another version of these scripts")
    if content.pop("digest", None) != digest_of_json(content):
        raise ValueError("changed since it was written")
    fields = _typed(content, _FIELDS)
    settings = _typed(fields["settings"], _SETTINGS)
    if settings["loss"] not in GRADIENT_LOSSES or settings["gradient_type"] not in GRADIENT_TYPES:
        raise ValueError(f"no settings of gradients: {settings}")
    layers = [layer_of_json(layer) for layer in fields["layers"]]
    kept = GradientSettings(**settings | {"dataset": Mixture.of(settings["dataset"])})  # several texts in one string
    return Artifact(**{**fields, "settings": kept, "layers": layers})


def layer_of_json(layer: object) -> LayerSensitivity:
    """The inverse of `asdict`. Raises `ValueError` for what is no layer."""
    fields = _typed(layer, {"layer": dict, "linears": dict})
    return LayerSensitivity(_spread(fields["layer"]), {name: _spread(v) for name, v in fields["linears"].items()})


def _spread(values: object) -> Spread:
    spread = Spread(**_typed(values, {"count": int, "mean": float, "std": float, "redundancy": float}))
    if not spread.redundancy <= spread.count:  # as the Cauchy-Schwarz inequality has it
        raise ValueError(f"a redundancy that cannot be: {values}")
    return spread


def _typed(value: object, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The value, if it is an object with just these fields, numbers not negative. Raises `ValueError`."""
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise ValueError(f"no object of {', '.join(kinds)}")
    for name, kind in kinds.items():
        found = value[name]
        if type(found) is not kind or isinstance(found, int | float) and not found >= 0:
            raise ValueError(f"{name} is no {kind.__name__} that can be")
        if isinstance(found, str) and not found.isprintable():
            raise ValueError(f"{name} has control characters")
    return value


# Checks ---------------------------------------------------------------------------------------------------------------


def check_settings(
    artifact: Artifact, path: Path, settings: GradientSettings, windows: torch.Tensor, advice: str
) -> None:
    """Raises `InputError` unless the artifact was computed with these settings, on these windows (N, T).

    `advice` says what to do then.
    """
    for name, value in asdict(settings).items():
        if name != "dataset" and (found := getattr(artifact.settings, name)) != value:
            raise InputError(f"gradients {path}: made with {name} {found}, not {value}; {advice}")
    if artifact.text != digest_of(windows):
        raise InputError(
            f"gradients {path}: made on other text than {settings.dataset} is now (or by another tokenizer); {advice}"
        )


def check_model(artifact: Artifact, path: Path, model: str, decoder: Decoder, digest: str, advice: str) -> None:
    """Raises `InputError`, with `advice`, unless the artifact was computed from this model, of that fingerprint."""
    matrices = find_matrices(decoder)
    sizes = [{name: matrix.stored.numel() for name, matrix in layer.items()} for layer in matrices]
    found = [{name: spread.count for name, spread in layer.linears.items()} for layer in artifact.layers]
    if artifact.fingerprint != digest or found != sizes:
        raise InputError(
            f"gradients {path}: made for another model than {model} as it is now (or for another --dtype); {advice}"
        )
