"""The key of a result: everything that it depends on. Imports no torch.

A key has all settings of a run but those whose flags are in `WITHOUT_EFFECT`, and those that the run has no use for.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import lib
from lib.config.mixture import SELF, Mixture
from lib.config.snapshot import FILE, MODEL, TEXT, Snapshot, entry

_ONLY_ROUNDING = "changes the last digits at most; a stopped run may go on elsewhere, or with smaller batches"
_WHERE = "says where files are written"
_EVERYWHERE = {
    "overwrite": "is about what was written before",
    "resume": "goes on to the result of a run that was not stopped",
    "device": _ONLY_ROUNDING,
    "device_map": _ONLY_ROUNDING,
    "offload": _ONLY_ROUNDING,
}
_OF_RUN = {
    "output_dir": _WHERE,
    "batch_size": _ONLY_ROUNDING,
    "dry_run": "stops before there is a result",
    "save_model": "saves what was measured; a finished run that saved no such model is refused",
}
_OF_RUNS = {**_EVERYWHERE, **_OF_RUN, "preset": "stands for the flags that it sets"}
_CACHE_DIR = "says where the hub's files are kept; their id names them"
WITHOUT_EFFECT: dict[str, dict[str, str]] = {  # by script: the flags that cannot change a result, and why
    "ppllms": {
        **_OF_RUNS,
        "cache_dir": _CACHE_DIR,
        "num_blocks": "is compared with the model",
        "save_format": _OF_RUNS["save_model"],
        "gguf": "prunes a file, without a run",
        "gguf_weights": "is of --gguf",
    },
    "alp_prune": {
        **_OF_RUNS,
        "cache_dir": _CACHE_DIR,
        "model_name": "is the model's name in paths and logs",
        "save": _WHERE,
        "save_log": _WHERE,
    },
    "save_gradient": {**_EVERYWHERE, "cache_dir": _CACHE_DIR, "output": _WHERE},
    "heal": {
        **{flag: reason for flag, reason in _EVERYWHERE.items() if flag != "offload"},
        **_OF_RUN,
        "cache_dir": _CACHE_DIR,
        "save_format": _OF_RUN["save_model"],
    },
}
_EVALUATION = ("eval_stride", "eval_windows", "prompts", "tasks")
EVALUATION = {  # by script: settings of the evaluation, which a stopped run may go on without having
    "ppllms": (*_EVALUATION, "eval_ppl", "eval_datasets"),
    "alp_prune": (*_EVALUATION, "dataset"),
    "heal": (*_EVALUATION, "eval_datasets"),
}
_KINDS = {"model": MODEL, "teacher": MODEL}  # of what is read, by setting
_KINDS |= dict.fromkeys(("tasks", "gradient_file", "prompts"), FILE)
_KINDS |= dict.fromkeys(("dataset", "eval_datasets", "calibration_dataset", "compensate_dataset"), TEXT)


def key_of(tool: str, settings: Any, unused: Collection[str], as_json: Mapping[str, object]) -> dict:
    """The key of a run of `ppllms`, `alp_prune` or `heal`: the code, and all settings that can change the result.

    `unused`: settings that have no effect in this run. `as_json`: JSON values of those that are no JSON. Files stand in
    the key by what the settings' `snapshot` found in them.
    """
    assert isinstance(settings.snapshot, Snapshot), "the key is taken from a snapshot"
    source = asdict(settings.source)
    values = {"model": source.pop("name"), **source}
    values |= {field.name: getattr(settings, field.name) for field in fields(settings)} | dict(as_json)
    left_out = {"source", "snapshot", "cache_dir", *_EVERYWHERE, *WITHOUT_EFFECT[tool], *unused}
    values = {name: value for name, value in values.items() if name not in left_out}
    stamps = settings.snapshot.stamps
    for name in _KINDS.keys() & values.keys():
        values[name] = _stamped(_KINDS[name], values[name], stamps)
    return {"tool": tool, "code": code_digest(), **values}


def work_of(key: Mapping[str, object]) -> dict:
    """The part of a key that the pruned model depends on: all but how it is evaluated."""
    return {name: value for name, value in key.items() if name not in EVALUATION[str(key["tool"])]}


def _stamped(kind: str, value: Any, stamps: Mapping[str, str]) -> Any:
    """A setting that names what is read, by the stamps of that; text that the model makes has none."""
    if isinstance(value, Mixture):
        of_each = _stamped(kind, value.texts, stamps)
        return of_each[0] if len(of_each) == 1 else list(zip(of_each, value.shares, strict=True))
    if isinstance(value, list | tuple):
        return [_stamped(kind, one, stamps) for one in value]
    return SELF if (kind, value) == (TEXT, SELF) else stamps[entry(kind, str(value))]


@cache
def code_digest() -> str:
    """A digest of this package's source: other code may give other results."""
    folder = Path(lib.__path__[0])
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return content.hexdigest()[:16]
