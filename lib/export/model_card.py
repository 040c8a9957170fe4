"""The model card of a saved folder, and what else travels with a pruned model: its plan, the license of its base.

The card is README.md, as hubs show it. Its last line lists what a run wrote beside the weights, with digests, so that
`--overwrite` tells these files from a user's, see `lib.storage.model_folder`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.config.plan import plan_beside
from lib.config.sources import ModelSource, expand, is_demo, is_gguf, is_hub_model, locate_model, short_name
from lib.export.huggingface import load_call, runtimes
from lib.export.reload import has_code
from lib.files import read_json
from lib.storage.atomic import write_json
from lib.storage.model_folder import CARD, seal
from lib.storage.output_folder import PLAN

_CARRIED = re.compile(r"(licen[sc]e|notice|use_policy|usage_policy)(\.(txt|md))?", re.IGNORECASE)
_OF_HUBS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")  # asked of a hub
_LARGEST = 2**20  # bytes of such a file
_OF_PLANS = "tool model model_path num_layers mha_removed ffn_removed experts_removed parameters save_format".split()


def write_card(folder: Path, result: dict[str, Any], source: ModelSource, samples: str) -> None:
    """Writes the card of a saved model, its plan if blocks were removed, and copies of its base's license and notices.

    `result` is the content of result.json, `samples` what the models wrote, as a section; empty without any.
    """
    written = []
    for name, content in _carried(source).items():
        (folder / name).write_bytes(content)
        written.append(name)
    plan = plan_of(result, source)
    if plan:
        write_json(folder / PLAN, plan)
        written.append(PLAN)
    seal(folder, "\n".join(card(folder, result, source, samples)), written)


def plan_of(result: dict[str, Any], source: ModelSource) -> dict[str, Any]:
    """The plan.json of a saved model: what its run removed and changed, or for a healed one what an earlier run did.

    `changed` lists linears by layer of the unpruned model and path. Empty for a model of which no blocks were removed.
    """
    if "mha_removed" in result:
        refits = result.get("compensation", {}).get("projections", ())
        changed = [[one["layer"], one["name"]] for one in refits if one["kept"]]
        return {name: result[name] for name in _OF_PLANS if name in result} | {"changed": changed}
    saved = plan_beside(source.name) if "healing" in result else None
    if not saved:
        return {}
    trained, numbers = result["healing"]["changed"], saved.plan.numbers_in(result["num_layers"])
    places = {(numbers[layer], path) for layer, path in trained} | set(saved.changed.linears if saved.changed else ())
    content = read_json(saved.path) | {"save_format": result["save_format"]}
    return content | {"changed": [list(place) for place in sorted(places)]}


def card(folder: Path, result: dict[str, Any], source: ModelSource, samples: str) -> Iterator[str]:
    """The lines of a model card."""
    yield from ("---", _header(result, source), "---", "")
    about = _depth if "mha_removed" in result else _healing if "healing" in result else _sparsity
    yield from about(result, source)
    yield from ("", "## Loading", "", *_loading(folder))
    yield from ("", "## How near it is to the base model", "", *_figures(result))
    environment = result["environment"]
    yield from ("", "## How it was made", "", "```", environment["command"], "```", "")
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    yield f"Version {environment['version']}; {versions}; {environment['device']}."
    if samples:
        yield from ("", samples.rstrip())


def _depth(result: dict[str, Any], source: ModelSource) -> Iterator[str]:
    """What depth pruning removed, and refitted."""
    yield f"# {short_name(source.name)}, without {result['parameters']['actual_rate']:.1%} of its parameters"
    how = f"depth pruning ({result.get('method', 'a saved plan')})"
    yield from ("", f"Made from {_linked(source)} by {how}. Numbers of layers are those of the base model.", "")
    yield from _removed(result)
    if compensation := result.get("compensation"):
        kept = sum(one["kept"] for one in compensation["projections"])
        yield from ("", f"{kept} output projections were refitted ({', '.join(compensation['dataset'])}).")


def _removed(plan: dict[str, Any]) -> Iterator[str]:
    """A table of what a plan removes."""
    yield from ("| removed | layers |", "|---|---|")
    yield f"| attention | {_numbers(plan['mha_removed'])} |"
    yield f"| FFN | {_numbers(plan['ffn_removed'])} |"
    for layer, experts in enumerate(plan.get("experts_removed", ())):
        if experts:
            yield f"| experts of layer {layer} | {_numbers(experts)} |"


def _sparsity(result: dict[str, Any], source: ModelSource) -> Iterator[str]:
    """How many weights weight pruning made zero."""
    yield f"# {short_name(source.name)}, with {result['sparsity']:.1%} zeros in its pruned matrices"
    how = f"weight pruning ({result['prune_method']})"
    yield from ("", f"Made from {_linked(source)} by {how}. Its size is that of the base.")


def _healing(result: dict[str, Any], source: ModelSource) -> Iterator[str]:
    """How a pruned model was trained."""
    healing = result["healing"]
    yield f"# {short_name(source.name)}, healed"
    aim = f"to the distributions of {short_name(healing['teacher'])}" if healing["teacher"] else "to text"
    how = f"{healing['steps_taken']:,} steps of training of low-rank adapters {aim}, which are merged"
    yield from ("", f"Made from the pruned model {_linked(source)} by {how} ({result['dataset']}).")
    if plan := plan_of(result, source):
        yield from ("", f"Before, {short_name(plan['model'])} had lost, in numbers of its layers:", "", *_removed(plan))


def _header(result: dict[str, Any], source: ModelSource) -> str:
    """The fields of a card that hubs read, as YAML."""
    from huggingface_hub import ModelCardData

    base = _base_card(source)
    tags = ["pruned", "depth-pruning" if "mha_removed" in result else "sparse"]
    base_model = source.name if is_hub_model(source.name) else None
    if "healing" in result:
        base_model = base_model or base.get("base_model")  # of the pruned model
        tags = [*(tag for tag in base.get("tags", ["pruned"]) if tag != "sparse"), "healed"]
        tags += ["sparse"] if result["healing"]["keeps_zeros"] else []
    known = {name: base[name] for name in ("license", "license_name", "license_link", "language") if base.get(name)}
    return ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        **known,
    ).to_yaml()


def _linked(source: ModelSource) -> str:
    name = short_name(source.name)
    return f"[{source.name}](https://huggingface.co/{source.name})" if is_hub_model(source.name) else name


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


def _loading(folder: Path) -> Iterator[str]:
    yield from ("```python", "from transformers import AutoTokenizer, " + load_call(folder).partition(".")[0], "")
    yield f"model = {load_call(folder, 'FOLDER')}"
    code = ", trust_remote_code=True" if has_code(folder) else ""  # or transformers asks whether to run it
    yield from (f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{code})', "```")
    commands = {
        "vLLM": "vllm serve FOLDER --trust-remote-code",
        "SGLang": "python -m sglang.launch_server --model-path FOLDER --trust-remote-code",
        "mlx-lm": 'mlx_lm.generate --model FOLDER --prompt "..."',
    }
    if told := [f"{commands[name]}  # {name}" for name in runtimes(folder) if name in commands]:
        yield from ("", "```bash", *told, "```")


def _figures(result: dict[str, Any]) -> Iterator[str]:
    """A table of perplexities and distances on every text, and the verdict."""
    if not result["perplexity"]:
        yield "Not measured."
        return
    yield from (
        "| text | model | perplexity | KL divergence, nats a token | top-1 agreement |",
        "|---|---|---|---|---|",
    )
    for text, values in result["perplexity"].items():
        for stage, value in values.items():
            told = [f"{value:.2f} ± {result['perplexity_standard_error'][text][stage]:.2f}"]
            for metric, form in (("kl_divergence", ".3f"), ("top1_agreement", ".1%")):
                found = result[metric].get(text, {}).get(stage)
                error = result[f"{metric}_standard_error"].get(text, {}).get(stage)
                told.append("" if found is None else f"{found:{form}} ± {error:{form}}")
            yield f"| {Path(text).name} | {stage} | {' | '.join(told)} |"
    if result["verdict"]:
        yield from ("", f"Verdict: {result['verdict']}.")


# What the base model brings -------------------------------------------------------------------------------------------


def _carried(source: ModelSource) -> dict[str, bytes]:
    """The license and notices of the base model, by name; none where they cannot be had."""
    if is_gguf(source.name) or is_demo(source.name):
        return {}
    if is_hub_model(source.name):
        found = {name: path for name in _OF_HUBS if (path := _from_hub(source, name))}
    else:
        found = {path.name: path for path in expand(source.name).iterdir() if _CARRIED.fullmatch(path.name)}
        found = {name: path for name, path in found.items() if not path.is_symlink() or _is_of_cache(path)}
    return {
        name: path.read_bytes() for name, path in found.items() if path.is_file() and path.stat().st_size <= _LARGEST
    }


def _is_of_cache(link: Path) -> bool:
    """True for a link of a hub's cache, from a snapshot to its blobs; any other could lead to a file of the user's."""
    return link.resolve().parent == link.absolute().parents[2] / "blobs"


def _base_card(source: ModelSource) -> dict[str, Any]:
    """The fields at the head of the base model's card; none where there is none that can be read."""
    from huggingface_hub import ModelCard

    path = _from_hub(source, CARD) if is_hub_model(source.name) else Path(locate_model(source.name)) / CARD
    if path is None or not path.is_file() or path.stat().st_size > _LARGEST:
        return {}
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever a card of anybody's makes a reader of YAML raise
        return {}


def _from_hub(source: ModelSource, name: str) -> Path | None:
    """A file of a hub model, from its cache or the hub; None without it."""
    from transformers.utils import cached_file

    try:
        found = cached_file(source.name, name, cache_dir=source.cache_dir, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None  # no network, and not in the cache
    return Path(found) if found else None
