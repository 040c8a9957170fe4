"""Checks that the weights of a checkpoint are those of its config: none missing, none more, all of the same size."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lib.config.model_files import weight_files
from lib.config.sources import is_gguf, locate_model
from lib.errors import InputError
from lib.models.modeling_pruned import LAYERS_NAMES, find_decoder, find_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BUFFERS = re.compile(r"rotary|inv_freq|masked_bias$|(attn|attention)\.bias$|position_ids$")  # of old checkpoints
_UNNOTICED = 2**27  # parameters, half a gigabyte in fp32
_GIVE = "give the config.json that belongs to these weights"


def check_file_sizes(name: str, outline: "PreTrainedModel") -> None:
    """Raises `InputError` if a local model would take memory that its files cannot account for.

    Where the difference is small, `check_loaded` tells which weights are at fault.
    """
    path = Path(locate_model(name))
    if not path.exists():
        return
    files = weight_files(path) if path.is_dir() else [path]
    held = sum(file.stat().st_size for file in files if os.path.isfile(file))
    per_byte = 8 if is_gguf(name) or getattr(outline.config, "quantization_config", None) else 1
    parameters = outline.num_parameters()
    if parameters > held * per_byte + _UNNOTICED:
        raise InputError(f"{name}: {held:,} bytes of weights cannot hold the {parameters:,} of its config; {_GIVE}")


def check_loaded(name: str, model: "PreTrainedModel", loaded: dict, advice: str | None = None) -> None:
    """Raises `InputError` unless a model has all the weights of its checkpoint and no others.

    `loaded` is the loading info of `from_pretrained`; `advice` is given in place of that for wrong files.
    """
    if mismatched := sorted(loaded["mismatched_keys"]):
        key, held, expected = mismatched[0]
        sizes = f"{key} is {list(held)} in the checkpoint and {list(expected)} by the config"
        raise InputError(f"{name}: {len(mismatched)} weights have another size ({sizes}); {_GIVE}")
    if missing := sorted(loaded["missing_keys"]):
        what = f"{len(missing)} weights are not in the checkpoint ({missing[0]}, ...)"
        raise InputError(f"{name}: {what}; {advice or 'give a complete checkpoint'}")
    if more := surplus_weights(model, loaded["unexpected_keys"]):
        what = f"the checkpoint has {len(more)} weights that its config has no place for ({', '.join(more[:2])}, ...)"
        raise InputError(f"{name}: {what}; {advice or _GIVE}")


def surplus_weights(model: "PreTrainedModel", unexpected: Iterable[str]) -> list[str]:
    """Those of a checkpoint's unexpected weights that belong to the decoder itself, sorted.

    They lie in one of its layers, or in a module that has other weights (a bias). Not among them are buffers of old
    checkpoints, layers that predict further tokens, and parts that a decoder works without, as vision towers and
    value heads.
    """
    decoder, modules = find_decoder(model), dict(model.named_modules())
    path = next((name for name, module in modules.items() if module is decoder), "")
    number = getattr(model.config.get_text_config(decoder=True), "num_nextn_predict_layers", None) or 0
    layers = find_name(decoder, LAYERS_NAMES) or "layers"
    ahead = range(len(getattr(decoder, layers, ())), len(getattr(decoder, layers, ())) + number)
    parts = [*path.split("."), layers] if path else [layers]
    starts = "|".join(re.escape(".".join(parts[cut:])) for cut in range(len(parts)))  # with or without `model.`
    in_layer = re.compile(rf"(?:{starts})\.(\d+)\.")
    kinds = (".weight", ".bias") if getattr(model, "is_quantized", False) else ""

    def is_surplus(name: str) -> bool:
        if _BUFFERS.search(name) or not name.endswith(kinds):
            return False
        if found := in_layer.match(name):
            return int(found[1]) not in ahead
        parent = name.rpartition(".")[0]
        module = modules.get(parent) or modules.get(f"{model.base_model_prefix}.{parent}")
        return module is not None and any(weight is not None for weight in module._parameters.values())

    return sorted(filter(is_surplus, unexpected))
