"""Checks of the files that are given as a model, before any is loaded. Imports no torch."""

import json
import os
import re
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.files import read_file, read_json

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_LOADED = (
    "model.safetensors",
    "pytorch_model.bin",
)  # or the files that an index of this name lists; the first there is
_INDEX = ".index.json"
ADAPTER_FILE = "adapter_config.json"
GGUF = ".gguf"  # suffix of llama.cpp's files of models
_OTHER_WEIGHTS = (GGUF, ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_LARGEST_CONFIG, _LARGEST_TOKENIZER = 2**24, 2**28  # bytes; the largest tokenizers have some 40 MB
_HUB_ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/+(?!datasets/|spaces/)([\w.-]+(?:/[\w.-]+)?)"
)

_MOST_LAYERS, _MOST_EXPERTS, _LARGEST_SIZE, _LONGEST_CONTEXT = 2**12, 2**14, 2**24, 2**40
_LIMITS = (  # (names in a config, least, most); models have up to 126 layers, 512 experts and 262,144 tokens
    ("num_hidden_layers num_layers n_layer n_layers", 1, _MOST_LAYERS),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", 0, _MOST_EXPERTS),
    ("hidden_size n_embd d_model vocab_size num_attention_heads n_head num_key_value_heads head_dim", 1, _LARGEST_SIZE),
    ("intermediate_size n_inner ffn_dim ffn_hidden_size", 1, _LARGEST_SIZE),
    ("max_position_embeddings n_positions", 1, _LONGEST_CONTEXT),
)
_RANGES = {name: (least, most) for names, least, most in _LIMITS for name in names.split()}


def hub_id_of(address: str) -> str | None:
    """The hub id in the address of a model's page or of a file there; None for anything else."""
    found = _HUB_ADDRESS.match(address)
    return found[1] if found else None


def refuse_path(path: Path) -> str:
    """Why a path that is no folder and no GGUF file cannot be a model, and what to give instead."""
    if path.is_symlink() and not path.exists():
        return "is a link that leads nowhere; give the folder itself"
    if not path.exists():
        return "no such folder or file; give a hub id, a GGUF file, or a folder with config.json and weights"
    if path.is_file() and any((path.parent / name).is_file() for name in ("config.json", ADAPTER_FILE)):
        return f"is a file of a model; give its folder {path.parent}"
    return "is not a folder or GGUF file; give one of these, or a hub id"


def check_folder(name: str, folder: Path) -> None:
    """Raises `InputError` unless a folder has a config that can be built, weights and a tokenizer."""
    if (folder / ADAPTER_FILE).is_file():
        raise InputError(f"model {name}: {adapter_advice(name)}")
    others = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _OTHER_WEIGHTS)
    weights = weight_files(folder)
    if not weights and (files := [file for file in others if file.lower().endswith(GGUF)]):
        raise InputError(f"model {name}: a folder of GGUF files; give one of them, as {folder / files[0]}")
    config = folder / "config.json"
    if not config.is_file():
        below = sorted(path.parent for depth in ("*", "snapshots/*") for path in folder.glob(f"{depth}/config.json"))
        what = f"but there is one in {below[-1]}; give that" if below else "give one that save_pretrained() wrote"
        raise InputError(f"model {name}: no config.json in this folder{',' if below else ';'} {what}")
    check_config(name, _read_config(name, config))
    for index in sorted(folder.rglob(f"*{_INDEX}")):
        for listed in _listed(index):
            if os.path.isabs(listed) or ".." in Path(listed).parts:
                what = f"{index.name} names weights outside the folder ({listed})"
                raise InputError(f"model {name}: {what}; copy them into it")
    if not weights:
        found = f" but {others[0]}" if others else ""
        raise InputError(f"model {name}: no weights (*.safetensors) in this folder{found}; give one with its weights")
    for file in weights:
        if not os.path.isfile(file):
            what = f"{file.relative_to(folder)} is no file, or a link that leads nowhere"
            raise InputError(f"model {name}: {what}; copy the file there")
    tokenizers = [folder / file for file in _TOKENIZER_FILES if (folder / file).is_file()]
    if not tokenizers:
        raise InputError(f"model {name}: no tokenizer in this folder; copy tokenizer.json of the model into it")
    for file in tokenizers:
        if (size := file.stat().st_size) > _LARGEST_TOKENIZER:
            raise InputError(
                f"model {name}: {file.name} has {size:,} bytes, more than a tokenizer; copy the model's own"
            )


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that loading a folder reads, whether they are there or not, sorted.

    They are those that its config, or an index, names; in a folder without such names, all that look like weights.
    """
    for name in (*_named_by_config(folder), *(loaded + end for loaded in _LOADED for end in ("", _INDEX))):
        if os.path.lexists(folder / name):
            found = _listed(folder / name) if name.endswith(_INDEX) else [name]
            if found:
                return sorted(folder / file for file in found)
    return sorted(all_weights(folder))


def all_weights(folder: Path) -> set[Path]:
    """All files at the top of a folder that look like weights of Transformers, loaded or not."""
    return {file for pattern in _WEIGHTS for file in folder.glob(pattern)}


def adapter_advice(name: str) -> str:
    """What is said of a model that is, or comes with, an adapter."""
    merge = f'AutoPeftModelForCausalLM.from_pretrained("{name}").merge_and_unload().save_pretrained(FOLDER)'
    return (
        f"holds a PEFT adapter ({ADAPTER_FILE}), which cannot be pruned; merge it into its model with {merge}, "
        "save the tokenizer there too, and give that folder"
    )


def check_config(name: str, config: Any) -> None:
    """Raises `InputError` for a config whose sizes are no sizes, or so large that building the model would not end.

    At most 4,096 layers, 16,384 experts, and sizes of 2^24. `config` is the content of config.json.
    """
    waiting = [config]
    while waiting:
        part = waiting.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                waiting.append(value)
            elif key in _RANGES and value is not None:
                least, most = _RANGES[key]
                for number in value if isinstance(value, list) else [value]:
                    if type(number) is not int or not least <= number <= most:
                        given = f"{key} is {json.dumps(number)[:40]}"
                        raise InputError(f"model {name}: config.json: {given}, not a number from {least} to {most:,}")


def _read_config(name: str, path: Path) -> Any:
    """The content of a config.json. Raises `InputError` for anything but an object."""
    try:
        config = json.loads(read_file(path, _LARGEST_CONFIG))  # some configs hold Infinity
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"model {name}: config.json cannot be read ({reason}); copy the model's own") from error
    if not isinstance(config, dict):
        raise InputError(f"model {name}: config.json holds no object; copy the model's own")
    return config


def _listed(index: Path) -> set[str]:
    """The files of weights that an index names; none of a broken one, which the loader reports."""
    try:
        return {name for name in read_json(index)["weight_map"].values() if isinstance(name, str)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()


def _named_by_config(folder: Path) -> list[str]:
    """The file of weights, or index, that a config names in place of the usual ones."""
    try:
        named = json.loads(read_file(folder / "config.json", _LARGEST_CONFIG)).get("transformers_weights")
    except (OSError, ValueError, RecursionError, AttributeError):
        return []
    is_inside = isinstance(named, str) and not os.path.isabs(named) and ".." not in Path(named).parts
    return [named] if is_inside else []  # the loader refuses one outside
