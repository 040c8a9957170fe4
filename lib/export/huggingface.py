"""Saves pruned checkpoints that stock tools load. Formats are checked against the model in memory.

`hf`            without the removed sublayers and layers. If only whole layers were removed, a stock checkpoint;
                otherwise the folder carries `modeling_pruned.py` and loads with `trust_remote_code=True`.
`masked`        the stock architecture at full size, with zeros in the output projections of removed sublayers.
`nemotron-nas`  Llama-like models as vLLM's `DeciLMForCausalLM`; see `lib.export.nemotron_nas`.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import lib.models.modeling_pruned as modeling_pruned
from lib.config.plan import Mode, Plan
from lib.errors import InputError, RunError, first_line
from lib.export import nemotron_nas
from lib.export.reload import SaveError, auto_class_of, check_reload, check_window, has_code, logits_of
from lib.export.templates import PRUNED_CLASS
from lib.models.decoder import Decoder
from lib.models.experts import count_names
from lib.models.loading import auto_class
from lib.models.modeling_pruned import (
    LAYERS_NAMES,
    PREFIX,
    RETURNS,
    SKIP,
    SKIP_ATTENTION,
    SKIP_FFN,
    TYPE_PREFIX,
    Skipped,
    cache_types,
    empty,
    find_decoder,
    find_name,
    lost_sublayers,
    number_layers,
    skip_sublayers,
    unusual_returns,
)
from lib.models.offload import follow, layers_of, offloaded
from lib.models.residual_writers import OUTPUT_PROJECTIONS
from lib.models.shared_kv import writing_layers
from lib.models.weight_deltas import Changes, difference
from lib.storage.model_folder import is_gguf_target


def check_format(decoder: Decoder, save_format: str, plan: Plan | None = None) -> None:
    """Raises `InputError` when a format cannot hold the model, under the given plan or, without one, under any plan."""
    model, name = decoder.model, decoder.family
    if save_format == "hf" and not type(model).__module__.startswith("transformers."):
        raise InputError(f"--save_format hf: {name} is not a class of transformers; use --save_format masked")
    is_elsewhere = decoder.has_weights and any(parameter.is_meta for parameter in model.parameters())
    if save_format == "masked" and is_elsewhere and not decoder.is_offloaded:
        advice = "use --offload cpu or disk in place of --device_map"
        raise InputError(f"--save_format masked: weights that a device map offloaded cannot be masked; {advice}")
    if save_format == "masked" and len(decoder.whole_layers) < decoder.num_layers:
        raise InputError("--save_format masked: the model has lost sublayers before, not masked; use --save_format hf")
    if save_format == "nemotron-nas":
        # Without a plan: a search by PP-LLMs does not touch layers that have lost a sublayer.
        nemotron_nas.check_plan(decoder.complete(plan or Plan(decoder.num_layers)))
        if decoder.has_weights:
            nemotron_nas.check_model(model)
        else:
            nemotron_nas.check_config(decoder.config)


def check_compact(outline: Decoder, save_format: str, plan: Plan, when: str = "", otherwise: str = "") -> None:
    """Raises `InputError` when a model without weights could not be saved without the parts that a plan removes.

    The message says `when` this is so, and what can be done `otherwise` than to use the format masked.
    """
    try:
        compact(Decoder(copy.deepcopy(outline.model), has_weights=False), plan)
    except SaveError as error:
        advice = "leave --save_model out" if plan.experts_removed else f"use --save_format masked{otherwise}"
        raise InputError(f"--save_format {save_format}: {error}{when}; {advice}") from error


# Saving ---------------------------------------------------------------------------------------------------------------


def save_pruned(
    decoder: Decoder,
    plan: Plan,
    tokenizer,
    folder: Path,
    save_format: str = "hf",
    windows: torch.Tensor | None = None,
    checking: Callable[[], AbstractContextManager] = nullcontext,
    max_shard_size: str | None = None,
) -> None:
    """Prunes the model in memory by a plan and writes it, with tokenizer and generation config, to a new folder.

    `decoder` must not be used afterwards. The saved model is loaded again and compared with the model under the plan,
    on the first of the windows (N, T) if given; both inside `checking`. Raises `SaveError` for a model that the format
    cannot hold.
    """
    with (
        _checked(folder, decoder, plan, windows, checking),
        TemporaryDirectory(prefix=".changes-", dir=folder) as changes,
    ):
        if save_format == "masked":
            zero_sublayers(decoder, plan, Changes(Path(changes)))
        else:
            compact(decoder, plan)
        _write(decoder.model, tokenizer, folder, max_shard_size, save_format)


def save_weights(
    decoder: Decoder,
    tokenizer,
    folder: Path,
    windows: torch.Tensor | None = None,
    checking: Callable[[], AbstractContextManager] = nullcontext,
    max_shard_size: str | None = None,
) -> None:
    """Writes a model whose weights were changed in place, in the form it was loaded from, to a new folder.

    It is checked, and the arguments and errors are, as in `save_pruned`.
    """
    with _checked(folder, decoder, Plan(decoder.num_layers), windows, checking):
        _write(decoder.model, tokenizer, folder, max_shard_size, "hf")


@contextmanager
def _checked(
    folder: Path,
    decoder: Decoder,
    plan: Plan,
    windows: torch.Tensor | None,
    checking: Callable[[], AbstractContextManager],
) -> Iterator[None]:
    """Makes the folder; what the block saves there must give the logits of the model under the plan before it."""
    with checking():
        input_ids = check_window(decoder, windows)
        expected = logits_of(decoder, input_ids, plan)
    device = decoder.device
    folder.mkdir(parents=True, exist_ok=True)
    yield
    with checking():
        check_reload(folder, decoder.model, device, input_ids, expected)


def _write(model: PreTrainedModel, tokenizer, folder: Path, max_shard_size: str | None, save_format: str) -> None:
    """Writes a model that is pruned in memory, and its tokenizer.

    The default shard size is that of transformers, but smaller for layers on disk: one shard at a time is in memory.
    """
    is_on_disk = any((layer := offloaded(one)) and layer.is_on_disk for one in layers_of(model))
    max_shard_size = max_shard_size or ("500MB" if is_on_disk else "5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, content in getattr(model, "files_beside", {}).items():
        (folder / name).write_bytes(content)
    if save_format == "nemotron-nas":
        nemotron_nas.save(model, folder, max_shard_size)
        return
    # transformers renames the weights of some stock classes when it loads them, but not those of their subclasses.
    is_stock = not _lacks_sublayers(model)
    with warnings.catch_warnings():  # about offloaded weights, which are read shard by shard
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=is_stock)
    _finish_folder(model, folder)


def how_to_load(folder: Path) -> str:
    """The call of transformers that loads a saved model, and what else does; or what runs a GGUF file."""
    if is_gguf_target(folder):
        return f"llama-cli -m {folder}"
    others = runtimes(folder)[1:]
    return load_call(folder) + (f"; runs in {', '.join(others)} too" if others else "")


def load_call(folder: Path, name: str | None = None) -> str:
    """The call of transformers that loads a saved model, under its own name or another."""
    code = ", trust_remote_code=True" if has_code(folder) else ""
    return f'{auto_class_of(folder).__name__}.from_pretrained("{name or folder}"{code})'


def runtimes(folder: Path) -> list[str]:
    """What loads a saved model: transformers, and what else is known to."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return nemotron_nas.runtimes(config) if config.get("model_type") == "nemotron-nas" else ["transformers"]


@torch.no_grad()
def zero_sublayers(decoder: Decoder, plan: Plan, changes: Changes | None = None) -> None:
    """Switches all sublayers on and zeroes the output projections of those that the plan removes.

    For a model whose layers are read from disk, the zeros go to `changes`. Raises `RunError` for weights that a device
    map offloaded.
    """
    if changes:
        follow(decoder.layers, [changes], besides=True)
    for index in range(decoder.num_layers):
        decoder.set_mode(index, Mode())
        mode = plan.mode(index)
        if mode.is_whole:
            continue
        with decoder.at(index):
            outputs: dict[str, torch.Tensor] = {}
            for kind, is_on in ((SKIP_ATTENTION, mode.attention), (SKIP_FFN, mode.ffn)):
                outputs |= {} if is_on else _output_parameters(decoder, index, kind)
            if any(parameter.is_meta for parameter in outputs.values()):
                raise RunError("--save_format masked: a device map offloaded the weights; use --offload in its place")
            if changes and decoder.is_on_disk:
                zeros = {path: difference(old, torch.zeros_like(old)) for path, old in outputs.items()}
                changes.write(index, zeros)
            for parameter in outputs.values():
                parameter.zero_()
            decoder.keep(index)


def _output_parameters(decoder: Decoder, index: int, kind: str) -> dict[str, torch.Tensor]:
    """{path within the layer: parameter} of what writes to the residual stream at the end of a sublayer's modules.

    Of a module without a projection of a known name it is the whole module, unless that is a linear of another width.
    """
    found: dict[str, torch.Tensor] = {}
    for name in decoder.sublayers[index][kind]:
        module = getattr(decoder.layers[index], name)
        parameters = {f"{name}.{inner}": parameter for inner, parameter in module.named_parameters()}
        parts = {path: {part.removesuffix("_bias") for part in path.split(".")} for path in parameters}
        if known := {path: one for path, one in parameters.items() if OUTPUT_PROJECTIONS & parts[path]}:
            found |= known
        elif getattr(module, "out_features", decoder.config.hidden_size) == decoder.config.hidden_size:
            found |= parameters
    return found


def compact(decoder: Decoder, plan: Plan) -> None:
    """Deletes removed sublayers and layers from the model and rewrites its config, in place.

    Where a layer's number decides how it is built, layers that lose everything stay as empty ones, under their numbers.
    A plan that removes experts removes nothing else.
    Raises `SaveError` when a model built from the new config differs from the model in memory.
    """
    plan = decoder.complete(plan)
    decoder.apply(plan)
    model, config, given = decoder.model, decoder.config, copy.deepcopy(vars(decoder.config))
    if plan.experts_removed:
        _count_experts(decoder, plan)
        _check_rebuilt(model)
        return
    forms = [(plan.kept_layers, True), (plan.kept_layers, False), (list(range(plan.num_layers)), False)]
    for form, (kept, adapts_types) in enumerate(forms, 1):
        for index in set(kept) & set(plan.removed_layers):
            empty(decoder.layers[index])
        _keep(decoder, kept, adapts_types)
        try:
            _check_rebuilt(model)
            return
        except SaveError:
            if form == len(forms):
                raise
        vars(config).clear()
        vars(config).update(copy.deepcopy(given))


def _count_experts(decoder: Decoder, plan: Plan) -> None:
    """Makes the config tell how many experts the plan leaves in each layer."""
    for experts, removed in zip(decoder.experts, plan.experts_removed, strict=True):
        if experts and removed:
            for name in count_names(decoder.config, experts.count):
                setattr(decoder.config, name, experts.count - len(removed))
            return


def _keep(decoder: Decoder, kept: list[int], adapts_types: bool) -> None:
    """Deletes all other layers from the model and from its config."""
    parent = find_decoder(decoder.model)
    layers = nn.ModuleList(decoder.layers[index] for index in kept)
    setattr(parent, find_name(parent, LAYERS_NAMES), layers)
    _rewrite_config(decoder.config, kept, layers, adapts_types)
    number_layers(layers, getattr(decoder.config, "layer_types", None))


def _rewrite_config(config: PreTrainedConfig, kept: list[int], layers: nn.ModuleList, adapts_types: bool) -> None:
    """Makes the config describe the layers that are kept, and what they have lost."""
    num_layers, given = config.num_hidden_layers, config.to_dict()
    for name, value in given.items():
        if isinstance(value, list) and len(value) != num_layers:
            value = getattr(config, name, None)  # which Dory writes with an entry for each sublayer
        if "layer" in name and isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    if adapts_types and (layer_types := getattr(config, "layer_types", None)):
        with suppress(AttributeError):  # where they are computed from other entries
            config.layer_types = cache_types(layer_types, layers)
    _list_lost(config, given.get("per_layer_config") or {}, kept, layers)


def _list_lost(config: PreTrainedConfig, given: dict[Any, dict], kept: list[int], layers: nn.ModuleList) -> None:
    """Writes down what each layer has lost, see `lib.models.modeling_pruned`; `given` is the old `per_layer_config`."""
    lost = {index: kinds for index, layer in enumerate(layers) if (kinds := lost_sublayers(layer))}
    returns = {index: values for index, layer in enumerate(layers) if (values := unusual_returns(layer))}
    # A family that has entries of its own expects layers of one type to have the same, so `skip` is kept apart.
    own = {int(i): {key: value for key, value in entry.items() if key != "skip"} for i, entry in given.items()}
    is_own = any(own.values())
    entries: dict[int | str, dict[str, Any]] = {i: own[old] for i, old in enumerate(kept) if own.get(old)}
    entries |= {} if is_own else {index: {"skip": kinds} for index, kinds in lost.items()}
    if entries or given:
        config.per_layer_config = entries or None
    for name, value in ((SKIP, lost if is_own else {}), (RETURNS, returns)):
        if value:
            setattr(config, name, {str(index): one for index, one in value.items()})
        elif hasattr(config, name):
            delattr(config, name)


def _check_rebuilt(model: PreTrainedModel) -> None:
    """Builds the model on the meta device, from its config as it will be read, and compares it with that in memory.

    Raises `SaveError` when they differ.
    """
    try:
        with TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            config = type(model.config).from_pretrained(folder)
        with torch.device("meta"):
            rebuilt = type(model)(config)
    except Exception as error:  # what a family raises for a config that it does not understand
        raise SaveError(f"a reload would fail ({first_line(error)})") from error
    if (count := len(layers_of(rebuilt))) != len(layers_of(model)):
        raise SaveError(f"a reload would have {count} layers in place of {len(layers_of(model))}")
    skip_sublayers(rebuilt)
    wanted, found = _describe(model), _describe(rebuilt)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise SaveError(f"a reload would have {name} = {found.get(name)} in place of {wanted.get(name)}")


def _describe(model: PreTrainedModel) -> dict[str, object]:
    """The shapes of all parameters, and plain attributes of the modules in the decoder layers, by dotted name.

    Where no layer reads the keys and values of another, it does not matter which layers keep theirs.
    """
    are_read = bool(writing_layers(model.config.get_text_config(decoder=True)))
    described: dict[str, object] = {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for path, module in layers_of(model).named_modules():
        for name, value in vars(module).items():
            is_plain = isinstance(value, str | int | float) and name != "training" and not name.startswith("_")
            if is_plain and (are_read or name != "store_full_length_kv"):
                described[f"{path}.{name}"] = value
    return described


def _lacks_sublayers(model: PreTrainedModel) -> bool:
    return any(isinstance(module, Skipped) for module in layers_of(model).modules())


def _finish_folder(model: PreTrainedModel, folder: Path) -> None:
    """Makes the folder of a model without some sublayers load with its own code, and in no other way."""
    if not _lacks_sublayers(model):
        return
    stock, path = type(model).__name__, folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    names = {"stock": stock, "pruned": PREFIX + stock, "config": PREFIX + type(model.config).__name__}
    source = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
    (folder / "modeling_pruned.py").write_text(source + PRUNED_CLASS.format(**names), encoding="utf-8")
    config["architectures"] = [names["pruned"]]
    config["model_type"] = TYPE_PREFIX + config["model_type"]
    config["auto_map"] = {
        "AutoConfig": f"modeling_pruned.{names['config']}",
        auto_class(model.config).__name__: f"modeling_pruned.{names['pruned']}",
    }
    if model.config.get_text_config(decoder=True) is not model.config:
        config["auto_map"]["AutoModelForImageTextToText"] = f"modeling_pruned.{names['pruned']}"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
