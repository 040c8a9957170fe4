"""Loading configs, tokenizers and models from a hub id or a local folder, with errors of one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lib.errors import InputError, is_out_of_memory
from lib.names import locate_model


def resolve_device(device: str) -> torch.device:
    """The torch device of a name; `auto` is CUDA or else the CPU. Raises `InputError` when it is not available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device}: not available here; use cpu or auto ({reason})") from error


def load_config(name: str, trust_remote_code: bool = False, cache_dir: Path | None = None):
    """The text model's configuration behind a hub id or a local folder."""
    from transformers import AutoConfig

    with _loading_errors(name):
        config = AutoConfig.from_pretrained(
            locate_model(name), trust_remote_code=trust_remote_code, cache_dir=cache_dir
        )
    return config.get_text_config(decoder=True)


def load_tokenizer(name: str, trust_remote_code: bool = False, cache_dir: Path | None = None):
    """The tokenizer behind a hub id or a local folder."""
    from transformers import AutoTokenizer

    with _loading_errors(name, "its tokenizer"):
        return AutoTokenizer.from_pretrained(
            locate_model(name), trust_remote_code=trust_remote_code, cache_dir=cache_dir
        )


def load_model(
    name: str,
    dtype: str = "auto",
    device: torch.device | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
) -> nn.Module:
    """A causal language model in eval mode, without gradients, on `device` or spread by `device_map`.

    `dtype` is a torch dtype's name, or `auto` for that of the checkpoint; `cache_dir` is where the hub's files are.
    Raises `InputError` when it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    with _loading_errors(name):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            locate_model(name),
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            cache_dir=cache_dir,
            output_loading_info=True,
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        needs_code = hasattr(model.config, "auto_map") and not trust_remote_code
        advice = "its own code may know better: add --trust_remote_code" if needs_code else "give a complete checkpoint"
        raise InputError(f"{name}: {len(missing)} weights are not in the checkpoint ({missing[0]}, ...); {advice}")
    if device_map is None and device is not None:
        model.to(device)
    return model.eval().requires_grad_(False)


def load_outline(config, trust_remote_code: bool = False) -> nn.Module | None:
    """The model of a config without its weights, to look at before they are read; None where that cannot be built."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # code that came with a model may do anything; the loaded model is checked in any case
        return None


@contextmanager
def _loading_errors(name: str, part: str = "the model") -> Iterator[None]:
    """Turns the errors of transformers and the hub into one line that says what to do."""
    try:
        yield
    except Exception as error:  # libraries raise all kinds for what is wrong with a folder
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(locate_model(name)).is_dir():
            raise InputError(f"{name}: {part} cannot be loaded from this folder ({reason})") from error
        advice = "without a network give the path of a local folder (config.json, *.safetensors, tokenizer files)"
        raise InputError(f"{name}: {part} cannot be loaded from the hub; {advice} ({reason})") from error
