"""The check of a save: the folder, loaded as anybody would load it, must give the logits of the measured model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lib.config.plan import Plan
from lib.errors import RunError, first_line, is_out_of_memory
from lib.models.decoder import Decoder
from lib.models.loading import auto_class
from lib.models.offload import disk_map
from lib.runtime.memory import free_bytes

_LONGEST = 128  # tokens of the window
_LEAST_TOLERANCE = 1e-5
_FITS = 0.8  # share of a device's free memory that a second model may take


class SaveError(RunError):
    """A folder as saved would not load, or would be another model than the one that was measured."""


def check_window(decoder: Decoder, windows: torch.Tensor | None) -> torch.Tensor:
    """The token ids (1, T) that a save is checked with: of the windows (N, T), or random ones if there are none."""
    if windows is not None:
        return windows[:1, :_LONGEST].cpu()
    context = getattr(decoder.config, "max_position_embeddings", None) or _LONGEST
    shape, generator = (1, min(context, _LONGEST)), torch.Generator().manual_seed(0)
    return torch.randint(decoder.config.vocab_size, shape, generator=generator)


@torch.no_grad()
def logits_of(decoder: Decoder, input_ids: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The logits (1, T, V) of a model under a plan, computed as in a run: layer by layer."""
    hidden_states, inputs = decoder.embed(input_ids)
    for index, mode in enumerate(plan.modes):
        hidden_states = decoder.run_layer(index, hidden_states, inputs, mode)
    return decoder.logits(hidden_states).cpu()


@torch.no_grad()
def check_reload(
    folder: Path, model: PreTrainedModel, device: torch.device, input_ids: torch.Tensor, expected: torch.Tensor
) -> None:
    """Loads a saved model and compares its logits with the expected ones (1, T, V).

    `model` is the saved model in memory, with the names of its modules. Where there is no room for a second one, layers
    are read from the folder one at a time. Raises `SaveError`.
    """
    try:
        with _loaded(folder, model, device) as reloaded:
            found = reloaded(input_ids=input_ids.to(device), use_cache=False).logits.cpu()
    except Exception as error:  # what a library raises for a broken folder
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno):
            raise
        raise SaveError(f"the saved model would not load again ({first_line(error)})") from error
    apart = distance(found, expected) if found.shape == expected.shape else float("inf")
    if not apart <= tolerance(expected.dtype):
        raise SaveError(
            f"the saved model would not be the measured one: its logits on a window of text are {apart:.1e} apart"
        )


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The Euclidean norm of the difference, as a share of that of what is expected; NaN or inf if only one has such."""
    found, expected = found.double(), expected.double()
    differs = (found != expected) & ~(found.isnan() & expected.isnan())
    if not differs.any():
        return 0.0
    return float((found - expected)[differs].norm() / expected[expected.isfinite()].norm())


def tolerance(dtype: torch.dtype) -> float:
    """The largest distance between logits of the same model.

    Both sides run the same operations on the same weights, so their logits are as a rule equal to the bit. Kernels may
    add in another order where memory is aligned otherwise; this changes sums in fp32 by about 1e-6, and in half
    precision now and then by one unit of the dtype.
    """
    return max(2 * torch.finfo(dtype).eps, _LEAST_TOLERANCE)


def has_code(folder: Path) -> bool:
    """True if the folder of a saved model holds code, without which it does not load."""
    return any(folder.glob("*.py"))


def auto_class_of(folder: Path) -> Any:
    """The class of transformers that loads a saved model."""
    config, _ = PreTrainedConfig.get_config_dict(folder)
    own = (name for name in config.get("auto_map", {}) if name.startswith("AutoModelFor"))
    name = next(own, None)
    return getattr(transformers, name) if name else auto_class(AutoConfig.from_pretrained(folder))


@contextmanager
def _loaded(folder: Path, model: PreTrainedModel, device: torch.device) -> Iterator[PreTrainedModel]:
    """The model of a folder, with its layers on disk where the device has no room for them.

    Its path is one that does not change from run to run, because transformers keeps a copy of the code for each name.
    """
    size = sum(parameter.nbytes for parameter in model.parameters())
    fits = size < _FITS * free_bytes(device)
    with TemporaryDirectory(prefix=".reloaded-", dir=folder) as place:
        path = Path(place) / "saved_model"
        path.symlink_to(folder.absolute())
        loaded: Any = auto_class_of(folder).from_pretrained(
            path,
            trust_remote_code=has_code(folder),
            device_map={"": device} if fits else disk_map(model, device),
            offload_folder=Path(place) / "offloaded",
            output_loading_info=True,
        )
        reloaded, found = loaded
        if missing := found["missing_keys"]:
            raise ValueError(f"no weights for {min(missing)}")
        yield reloaded.eval()
