"""The artifact: a small JSON file of a model's connection sensitivities, bound to the weights they come from."""

import hashlib
import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch

from lib.config.gradients import GradientSettings
from lib.errors import InputError
from lib.models.decoder import Decoder
from lib.models.linears import find_linears
from lib.sensitivity.gradients import LayerSensitivity, Spread
from lib.storage.atomic import write_json

_FORMAT = "connection-sensitivity/1"
_SAMPLED = 1024  # elements of each matrix that a fingerprint covers
_ADVICE = "make it again with save_gradient.py --overwrite, or delete it"


@dataclass(frozen=True)
class Artifact:
    """The sensitivities of a model's layers, and what they were computed from."""

    model: str
    fingerprint: str
    text: str  # digest of the windows
    settings: GradientSettings
    layers: list[LayerSensitivity]
    environment: dict


@torch.no_grad()
def fingerprint(decoder: Decoder) -> str:
    """A digest of all parameters' shapes, dtypes and values: all of a vector, evenly spaced elements of a matrix."""
    digest = hashlib.sha256(decoder.family.encode())
    layer_of = {module: index for index, layer in enumerate(decoder.layers) for module in layer.modules()}
    places = [(path, module, name) for path, module in decoder.model.named_modules() for name in module._parameters]
    known: set[int] = set()  # tied parameters count once
    for layer, of_layer in groupby(places, key=lambda place: layer_of.get(place[1])):
        with decoder.at(layer) if layer is not None else nullcontext():
            for path, module, name in of_layer:
                parameter = module._parameters[name]
                if parameter is not None and (layer is not None or id(parameter) not in known):
                    known.add(id(parameter))
                    _digest_parameter(digest, f"{path}.{name}".lstrip("."), parameter)
    return digest.hexdigest()


def _digest_parameter(digest, name: str, parameter: torch.Tensor) -> None:
    digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
    values = parameter
    if parameter.dim() > 1:
        matrix = parameter.reshape(-1, parameter.shape[-1])
        places = torch.linspace(0, matrix.numel() - 1, _SAMPLED, dtype=torch.float64, device="cpu").long()
        places = places.to(matrix.device)
        values = matrix[places // matrix.shape[1], places % matrix.shape[1]]
    digest.update(values.float().cpu().numpy().tobytes())


def digest_of(windows: torch.Tensor) -> str:
    """A digest of token windows (N, T)."""
    return hashlib.sha256(f"{tuple(windows.shape)}".encode() + windows.cpu().numpy().tobytes()).hexdigest()


def write(path: Path, artifact: Artifact) -> None:
    """Writes the file atomically; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": _FORMAT, **asdict(artifact)})


def read(path: Path) -> Artifact:
    """Reads the file. Raises `InputError` if it is missing, broken, or not an artifact."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"gradients {path}: no such file; make it with save_gradient.py") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"gradients {path}: broken, or no artefact ({str(error).splitlines()[0]}); {_ADVICE}"
        ) from error
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        layers = [layer_of_json(layer) for layer in content["layers"]]
        settings = GradientSettings(**content["settings"])
        return Artifact(
            content["model"], content["fingerprint"], content["text"], settings, layers, content["environment"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"gradients {path}: broken, or no artefact ({error!r}); {_ADVICE}") from error


def layer_of_json(layer: dict) -> LayerSensitivity:
    """The inverse of `asdict`. Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for invalid input."""
    linears = {name: _spread(values) for name, values in layer["linears"].items()}
    return LayerSensitivity(_spread(layer["layer"]), linears)


def _spread(values: dict) -> Spread:
    spread = Spread(**values)
    if not all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in asdict(spread).values()):
        raise ValueError(f"numbers that cannot be: {values}")
    return spread


def check_settings(artifact: Artifact, path: Path, settings: GradientSettings, windows: torch.Tensor) -> None:
    """Raises `InputError` unless the artifact was computed with these settings, on these windows (N, T)."""
    for name, value in asdict(settings).items():
        if name != "dataset" and (found := getattr(artifact.settings, name)) != value:
            raise InputError(f"gradients {path}: made with {name} {found}, not {value}; make another")
    if artifact.text != digest_of(windows):
        raise InputError(
            f"gradients {path}: made on other text than {settings.dataset} is now (or by another tokenizer); {_ADVICE}"
        )


def check_model(artifact: Artifact, path: Path, model: str, decoder: Decoder) -> None:
    """Raises `InputError` unless the artifact was computed from exactly these weights."""
    linears = find_linears(decoder)
    sizes = [{name: linear.weight.numel() for name, linear in layer.items()} for layer in linears]
    found = [{name: spread.count for name, spread in layer.linears.items()} for layer in artifact.layers]
    if artifact.fingerprint != fingerprint(decoder) or found != sizes:
        raise InputError(
            f"gradients {path}: made for another model than {model} as it is now (or for another --dtype); {_ADVICE}"
        )
