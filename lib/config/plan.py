"""Plans of depth pruning: which decoder layers lose their attention, which their FFN. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.config.sources import locate_model, short_name
from lib.errors import InputError, first_line
from lib.files import parse_json, read_file, read_json

MOST_LAYERS = 10_000  # the largest models have some hundreds
_BESIDE = "plan.json"  # in the folder of a saved model; what writes it has the name from `lib.storage.output_folder`


@dataclass(frozen=True)
class Mode:
    """Which sublayers of one decoder layer are on, and which of its experts are not."""

    attention: bool = True
    ffn: bool = True
    experts_removed: tuple[int, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.attention and self.ffn


@dataclass(frozen=True)
class Plan:
    """Which sublayers of a model are removed, or which experts; a layer in both lists is removed whole.

    `mha_removed` keeps the order in which the layers were chosen. `experts_removed` is empty, or has the numbers of the
    removed experts for every layer.
    """

    num_layers: int
    mha_removed: tuple[int, ...] = ()
    ffn_removed: tuple[int, ...] = ()
    experts_removed: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        for name in ("mha_removed", "ffn_removed"):
            layers = getattr(self, name)
            if len(set(layers)) < len(layers) or not all(0 <= layer < self.num_layers for layer in layers):
                raise ValueError(f"{name} {list(layers)} must name different layers below {self.num_layers}")
        if self.experts_removed and len(self.experts_removed) != self.num_layers:
            raise ValueError(f"experts_removed must have an entry for each of {self.num_layers} layers")
        if any(len(set(experts)) < len(experts) or min(experts, default=0) < 0 for experts in self.experts_removed):
            raise ValueError("experts_removed must name different experts")

    def mode(self, layer: int) -> Mode:
        experts = self.experts_removed[layer] if self.experts_removed else ()
        return Mode(layer not in self.mha_removed, layer not in self.ffn_removed, experts)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(self.mode(layer) for layer in range(self.num_layers))

    @property
    def removed_layers(self) -> list[int]:
        """The layers that lose both sublayers, ascending."""
        return sorted(set(self.mha_removed) & set(self.ffn_removed))

    @property
    def kept_layers(self) -> list[int]:
        """The layers that keep something, ascending: those of the smaller model."""
        return [layer for layer in range(self.num_layers) if layer not in self.removed_layers]

    def numbers_in(self, num_layers: int) -> list[int]:
        """The layers of the unpruned model that a pruned one of so many layers has, in order.

        Layers that lost everything may stay there as empty ones. Raises `ValueError` for another number of layers.
        """
        for numbers in (self.kept_layers, list(range(self.num_layers))):
            if len(numbers) == num_layers:
                return numbers
        raise ValueError(f"leaves {len(self.kept_layers)} of {self.num_layers} layers, and the model has {num_layers}")


@dataclass(frozen=True)
class Changed:
    """Linears whose weights were refitted or trained, and the model in which they were saved, if they were."""

    plan: Path  # where that is told
    linears: tuple[tuple[int, str], ...]  # (layer of the unpruned model, path of the module within the layer)
    folder: Path | None = None
    signature: str | None = None  # of the folder, as the run left it; None where the plan is one of its files
    is_masked: bool = False  # the saved model has all layers, under their old numbers


@dataclass(frozen=True)
class SavedPlan:
    """A plan that an earlier run found and wrote to its plan.json and result.json."""

    path: Path
    model: str  # the path, for a local folder
    plan: Plan
    parameters: int  # of that model
    changed: Changed | None = None

    def fits(self, parameters: int) -> bool:
        """True for about the same number of parameters; a fine-tuned model may have a few more tokens."""
        return abs(parameters - self.parameters) <= 0.01 * self.parameters


def read_plan(path: Path, row: str | None = None) -> SavedPlan:
    """The plan in a `result.json` or `plan.json` of `ppllms.py`, or in a row of a table's `results.jsonl`.

    Raises `InputError` for a file that holds none.
    """
    try:
        saved = _saved_plan(path, read_json(path) if row is None else _result_of_row(path, row))
    except OSError as error:
        raise InputError(f"--apply_plan {path}: cannot be read ({error.strerror}); give a run's result.json") from error
    except KeyError as error:
        raise InputError(f"--apply_plan {path}: has no {error}; give the result.json of a run of ppllms.py") from error
    except (ValueError, TypeError) as error:
        problem = first_line(error)
        raise InputError(f"--apply_plan {path}: holds no plan ({problem}); give a run's result.json") from error
    if len(saved.plan.mha_removed) == saved.plan.num_layers:
        raise InputError(f"--apply_plan {path}: removes every attention; one must stay")
    return saved


def plan_beside(model: str) -> SavedPlan | None:
    """The plan in the folder of a model that was pruned by one; None without. Raises `InputError` for a broken one."""
    path = Path(locate_model(model)) / _BESIDE
    if not path.is_file():
        return None
    try:
        return read_plan(path)
    except InputError as error:
        advice = "mend it, or take it out of the folder"
        raise InputError(f"--model {model}: {path} holds no plan that can be read; {advice}") from error


def _result_of_row(path: Path, row: str) -> Any:
    """The result of the one row whose label begins with `row`: its method, rate and seed. Raises `InputError`."""
    results = [parse_json(line)["result"] for line in read_file(path).splitlines()]
    names = {result["model"] for result in results}
    labels = [_label(result) + (f" {short_name(result['model'])}" if len(names) > 1 else "") for result in results]
    found = [result for result, label in zip(results, labels, strict=True) if f"{label} ".startswith(f"{row} ")]
    if len(found) != 1:
        problem = f"{len(found)} rows begin so; there are {', '.join(labels)}"
        raise InputError(f"--apply_plan {path.parent}#{row}: {problem}")
    return found[0]


def _label(result: dict) -> str:
    rate = result["parameters"]["target_rate"]
    return f"{result['method']} {'' if rate is None else f'{rate:g} '}seed {result['seed']}"


def _saved_plan(path: Path, content: Any) -> SavedPlan:
    """The plan in the content of a file. Raises `KeyError` and `ValueError`."""
    if not isinstance(content, dict) or content.get("tool") != "ppllms":
        raise ValueError("no result.json of ppllms.py")
    removed = {name: content[name] for name in ("mha_removed", "ffn_removed")}
    layers, model, parameters = content["num_layers"], content["model"], content["parameters"]
    path_of_model = content.get("model_path") or model
    if not all(isinstance(name, str) and name.strip() and name.isprintable() for name in (model, path_of_model)):
        raise ValueError("the model must have a name")
    if not isinstance(parameters, dict) or not all(isinstance(value, list) for value in removed.values()):
        raise ValueError("the fields of a result have other types")
    total = parameters["total"]
    experts = content.get("experts_removed", [])
    if not isinstance(experts, list) or not all(isinstance(of_layer, list) for of_layer in experts):
        raise ValueError("experts_removed has another type")
    numbers = (layers, total, *removed["mha_removed"], *removed["ffn_removed"], *(n for one in experts for n in one))
    if not all(type(number) is int for number in numbers):
        raise ValueError("numbers of layers and parameters must be whole")
    if not 0 < layers <= MOST_LAYERS or total < 1:
        raise ValueError(f"no model has {layers:,} layers and {total:,} parameters")
    plan = Plan(
        layers, **{name: tuple(value) for name, value in removed.items()}, experts_removed=tuple(map(tuple, experts))
    )
    return SavedPlan(path, path_of_model, plan, total, _changed(path, content, layers))


def _changed(path: Path, content: dict, num_layers: int) -> Changed | None:
    """What was changed in the weights that stay; None for nothing. Raises as `_saved_plan` does.

    The plan of a saved model lists it as `changed`, the result of a run in its `compensation`.
    """
    compensation, linears = content.get("compensation"), content.get("changed")
    if linears is not None:
        changed = _places(linears, num_layers)
        is_masked = content["save_format"] == "masked"
        return Changed(path, changed, path.parent, is_masked=is_masked) if changed else None
    if compensation is None:
        return None
    entries = compensation["projections"] if isinstance(compensation, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("the fields of its compensation have other types")
    if not all(type(entry["kept"]) is bool for entry in entries):
        raise ValueError("a refitted projection must be kept or not")
    changed = _places([[entry["layer"], entry["name"]] for entry in entries if entry["kept"]], num_layers)
    if not changed or content.get("saved_model") is None:
        return Changed(path, changed) if changed else None
    folder, digest, save_format = (content[name] for name in ("saved_model", "saved", "save_format"))
    if not all(isinstance(text, str) and text for text in (folder, digest, save_format)):
        raise ValueError("the saved model must have a folder, a digest and a format")
    if save_format == "gguf":
        return Changed(path, changed)
    return Changed(path, changed, Path(folder), digest, save_format == "masked")


def _places(linears: Any, num_layers: int) -> tuple[tuple[int, str], ...]:
    """Linears by layer and path within it. Raises `ValueError` for what is none, or comes twice."""
    if not isinstance(linears, list) or not all(isinstance(one, list) and len(one) == 2 for one in linears):
        raise ValueError("the changed linears must be a list of layers and names")
    for layer, name in linears:
        if type(layer) is not int or not 0 <= layer < num_layers:
            raise ValueError(f"a changed linear must be in a layer below {num_layers}")
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError("a changed linear must have a name")
    places = tuple((layer, name) for layer, name in linears)
    if len(set(places)) < len(places):
        raise ValueError("a changed linear comes twice")
    return places
