"""Loads configs, tokenizers and models from a hub id, a local folder or a GGUF file, with one-line errors."""

import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lib.config.model_files import adapter_advice, check_config
from lib.config.sources import ModelSource, is_gguf, locate_model
from lib.errors import InputError, first_line, is_out_of_memory
from lib.models import offload
from lib.models.checkpoint import check_file_sizes, check_loaded
from lib.models.gguf_header import read_header
from lib.models.modeling_pruned import PREFIX, TYPE_PREFIX, pruned_class, skip_lists
from lib.runtime.device import resolve_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGEST_GROWTH = 2**12  # of text by a tokenizer's normalizer


def load_config(source: ModelSource):
    """The text model's config.

    Raises `InputError` if it cannot be loaded, has sizes that cannot be built, has the format nemotron-nas, or comes
    with an adapter.
    """
    from transformers.utils import find_adapter_config_file

    located = locate_model(source.name)
    if is_gguf(source.name):
        read_header(Path(located))
    with _loading_errors(source.name):
        if not is_gguf(source.name) and find_adapter_config_file(located, cache_dir=source.cache_dir):
            raise InputError(f"model {source.name}: {adapter_advice(source.name)}")
        check_config(source.name, _read_config(source))
    config = _load_config(source)
    if getattr(config, "model_type", None) == "nemotron-nas":
        raise InputError(f"{source.name}: is in the format nemotron-nas; give the model saved as hf, or the dense one")
    return config.get_text_config(decoder=True)


def load_tokenizer(source: ModelSource):
    """The model's tokenizer.

    Raises `InputError` if it cannot be loaded, would fill the memory, or has a chat template with an unsafe name.
    """
    from transformers import AutoTokenizer

    config = _load_config(source)
    with _located(source) as (located, file), _loading_errors(source.name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            located,
            **file,
            config=config,
            trust_remote_code=source.trust_remote_code,
            cache_dir=source.cache_dir,
        )
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer and (growth := _growth(json.loads(normalizer.__getstate__()))) > _LARGEST_GROWTH:
        what = f"the normalizer of its tokenizer can make text {growth:,} times as long"
        raise InputError(f"{source.name}: {what}; copy the model's own tokenizer.json")
    templates = getattr(tokenizer, "chat_template", None)
    for name, template in templates.items() if isinstance(templates, dict) else ():
        if not re.fullmatch(r"\w[\w .-]{0,79}", str(name)) or not isinstance(template, str):
            advice = "its name becomes that of a file when the model is saved; rename it in the tokenizer's files"
            raise InputError(f"{source.name}: chat template {name!r} is no text with a plain name; {advice}")
    return tokenizer


def _growth(normalizer: dict) -> int:
    """How many times as long a normalizer of `tokenizers`, given as its JSON, can make a text by replacing parts."""
    return prod(map(_growth, normalizer.get("normalizers", ()))) * max(1, len(normalizer.get("content", "")))


def load_model(source: ModelSource) -> "PreTrainedModel":
    """A causal language model in eval mode, without gradients.

    A checkpoint with removed sublayers is loaded into the stock class without them, and needs no code of its own. A
    model that does not fit the device is offloaded, see `offload`. Raises `InputError` if it cannot be loaded.
    """
    device = resolve_device(source.device)
    config = _load_config(source)
    outline = load_outline(config, source.trust_remote_code)
    if outline is not None:
        check_file_sizes(source.name, outline)
    place = "none" if source.device_map else offload.choose(source.offload, outline, _dtype_of(source, config), device)
    device_map: str | dict[str, str] | None = source.device_map
    folder = None
    if place == "none" and device_map is None and device.type == "cuda":
        device_map = {"": str(device)}  # directly: host memory may not hold the model
    if place == "disk":
        if is_gguf(source.name):
            raise InputError(f"--offload disk: {source.name} cannot be read layer by layer; use --offload cpu")
        if outline is None:
            raise InputError(f"--offload disk: {source.name} cannot be built without its weights; use --offload cpu")
        device_map = offload.disk_map(outline, device)
        folder = tempfile.TemporaryDirectory(prefix="offloaded-")  # for weights not stored as safetensors
    model = _load_checked(source, config, device_map, folder.name if folder else None)
    if folder:
        offload.offload_to_disk(model, device)
        offload.delete_with(model, folder)
    elif place == "cpu":
        offload.offload_to_host(model, device)
    elif source.device_map is None:
        model.to(device)
    return model.eval().requires_grad_(False)


def auto_class(config) -> Any:
    """The class of transformers that loads a model of this config: for text, or for images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    is_of_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (
        AutoModelForImageTextToText
        if is_of_images and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        else (AutoModelForCausalLM)
    )


def _load_checked(source: ModelSource, config, device_map, offload_folder: str | None) -> Any:
    """The model of a checkpoint, with all of its weights and no others. Raises `InputError`."""
    from transformers import GgufConfig

    stock = _stock_of_pruned(config)
    with _located(source) as (located, file), _loading_errors(source.name), _quiet(bool(file)):
        loader: Any = pruned_class(stock) if stock else auto_class(config)  # stubs ignore `output_loading_info`
        dense = {"quantization_config": GgufConfig(dequantize=True)} if file else {}
        model, loaded = loader.from_pretrained(
            located,
            **file,
            **dense,
            config=config,
            dtype="auto" if source.dtype == "auto" else getattr(torch, source.dtype),
            device_map=device_map,
            offload_folder=offload_folder,
            trust_remote_code=source.trust_remote_code,
            cache_dir=source.cache_dir,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told by `check_loaded`, which can name them
        )
    needs_code = hasattr(config, "auto_map") and not source.trust_remote_code
    advice = "its own code may know better: add --trust_remote_code" if needs_code else None
    check_loaded(source.name, model, loaded, advice)
    if stock:
        model.__class__ = stock
    model.files_beside = files_beside(source) if config.get_text_config(decoder=True) is not config else {}
    if getattr(config, "quantization_config", None):
        model._weight_conversions = None  # else `save_pretrained` would quantize the weights again
    model.config.name_or_path = locate_model(source.name)
    return model


@contextmanager
def _quiet(reads_gguf: bool) -> Iterator[None]:
    """Keeps the progress bar of transformers' reader of GGUF files, which no setting turns off, out of logs."""
    with redirect_stderr(io.StringIO()) if reads_gguf and not sys.stderr.isatty() else nullcontext():
        yield


@contextmanager
def _located(source: ModelSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """What transformers loads a model from: a folder or hub id, and as keywords the GGUF file, if it is one.

    Transformers takes what lies beside a GGUF file for a part of it, so its folder is an empty one.
    """
    if not is_gguf(source.name):
        yield locate_model(source.name), {}
        return
    with tempfile.TemporaryDirectory(prefix="gguf-") as empty:
        yield empty, {"gguf_file": os.path.abspath(locate_model(source.name))}


_BESIDE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def files_beside(source: ModelSource) -> dict[str, bytes]:
    """What a model of more than text needs beside its tokenizer, by name: how images and sound become its inputs."""
    from transformers.utils import cached_file

    found: dict[str, bytes] = {}
    for name in _BESIDE:
        path = cached_file(
            locate_model(source.name), name, cache_dir=source.cache_dir, _raise_exceptions_for_missing_entries=False
        )
        if path:
            found[name] = Path(path).read_bytes()
    return found


def _dtype_of(source: ModelSource, config) -> torch.dtype:
    """The dtype that the weights will have."""
    found = getattr(config, "dtype", None) if source.dtype == "auto" else getattr(torch, source.dtype)
    return found if isinstance(found, torch.dtype) else torch.float32


def load_outline(config, trust_remote_code: bool = False) -> "PreTrainedModel | None":
    """The model of a config without weights, on the meta device, or None if it cannot be built."""
    stock = _stock_of_pruned(config)
    try:
        with torch.device("meta"):
            if stock:
                model = pruned_class(stock)(config)
                model.__class__ = stock
                return model
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # a model's own code can raise anything; the loaded model is checked in any case
        return None


def _load_config(source: ModelSource):
    """The config; of a checkpoint with removed sublayers that of its stock class, without code from its folder.

    Weights in FP8 and MXFP4 are loaded as dense ones. Raises `InputError` for other quantized weights.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = locate_model(source.name)
    with _loading_errors(source.name):
        given = _read_config(source)
        kind = str(given.get("model_type"))
        stock = kind.removeprefix(TYPE_PREFIX)
        if kind != stock and stock in CONFIG_MAPPING:
            config = AutoConfig.for_model(**{**given, "model_type": stock, "name_or_path": path})
        elif is_gguf(source.name):
            config = AutoConfig.for_model(**{**given, "name_or_path": path})
        else:
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=source.trust_remote_code, cache_dir=source.cache_dir
            )
        if _stock_of_pruned(config) and hasattr(config, "auto_map"):
            del config.auto_map
    if quantization := getattr(config, "quantization_config", None):
        _check_quantized(source, quantization.get("quant_method"), _dtype_of(replace(source, dtype="auto"), config))
        config.quantization_config = {**quantization, "dequantize": True}
    return config


def _read_config(source: ModelSource) -> dict[str, Any]:
    """What the config of a model says, before a class makes sense of it."""
    from transformers import PreTrainedConfig

    if is_gguf(source.name):
        path = locate_model(source.name)
        return deepcopy(_read_gguf_config(path, os.stat(path).st_mtime_ns))
    return PreTrainedConfig.get_config_dict(locate_model(source.name), cache_dir=source.cache_dir)[0]


@lru_cache(maxsize=1)
def _read_gguf_config(path: str, changed: int) -> dict[str, Any]:
    """What the config of a GGUF file says; kept, because transformers takes seconds to read a vocabulary."""
    from transformers import PreTrainedConfig

    with _located(ModelSource(path)) as (empty, file):
        return PreTrainedConfig.get_config_dict(empty, **file)[0]


def _check_quantized(source: ModelSource, method: str, dtype: torch.dtype) -> None:
    """Raises `InputError` unless quantized weights can be loaded as dense ones; `dtype` is that of the checkpoint."""
    if method not in ("fp8", "mxfp4"):
        advice = "pruning needs dense weights; give the model that it was made from"
        raise InputError(f"{source.name}: is quantized ({method}), and {advice}")
    own = str(dtype).removeprefix("torch.")
    if method == "fp8" and source.dtype not in ("auto", own):  # only the quantized weights would have that dtype
        raise InputError(f"--dtype {source.dtype}: the FP8 weights of {source.name} load as {own}; leave the flag out")


def _stock_of_pruned(config) -> type | None:
    """The stock class of a checkpoint with removed sublayers, as `lib.export` writes it; None for any other.

    Raises `ValueError` for a config that lists anything else as removed.
    """
    import transformers

    is_partial = any(skip_lists(config.get_text_config(decoder=True)))
    given = getattr(config, "architectures", None)
    name = str(given[0]) if isinstance(given, list) and given else ""
    if not re.fullmatch(rf"{PREFIX}\w+(ForCausalLM|LMHeadModel|ForConditionalGeneration)", name) or not is_partial:
        return None
    stock = getattr(transformers, name.removeprefix(PREFIX), None)
    return stock if isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel) else None


_REASONS = {  # words in an error -> our reason, where the library's own advice does not apply
    "trust_remote_code=True": "it needs code that comes with it; read that, if you trust it add --trust_remote_code",
    "Unrecognized model identifier": "transformers reads no such architecture; of a pruned file (deci) give the dense",
    "Weights only load failed": "its .bin file holds more than weights, and could run code; give *.safetensors",
}


@contextmanager
def _loading_errors(name: str, part: str = "the model") -> Iterator[None]:
    """Turns errors of transformers and the hub into one line that says what to do."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # libraries raise many types for a broken folder
        if is_out_of_memory(error):
            raise
        reason = next((advice for words, advice in _REASONS.items() if words in str(error)), first_line(error))
        if Path(locate_model(name)).exists():
            kind = "file" if is_gguf(name) else "folder"
            raise InputError(f"{name}: {part} cannot be loaded from this {kind} ({reason})") from error
        advice = "without a network give the path of a local folder (config.json, *.safetensors, tokenizer files)"
        raise InputError(f"{name}: {part} cannot be loaded from the hub; {advice} ({reason})") from error
