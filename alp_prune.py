#!/usr/bin/env python3
"""ALP: prunes the weights of a language model without training, with a sparsity for each layer.

Connection sensitivity (from save_gradient.py, or computed here) sets the sparsity of each layer; Magnitude, Wanda,
SparseGPT, ADMM or RIA choose the weights. Then perplexity is measured and the model saved.

    python alp_prune.py                                                  # bundled demo model and text
    python alp_prune.py --model Enoch/llama-7b-hf --prune_method wanda_alp --sparsity_ratio 0.7 --save_log
    python alp_prune.py --model PATH --prune_method sparsegpt --sparsity_type 2:4 --save_model OUT

Several methods, sparsities, models or seeds make a table; the same command resumes a stopped one:

    python alp_prune.py --preset demo
    python alp_prune.py --model PATH --prune_method wanda wanda_alp --sparsity_ratio 0.5 0.6 0.7 --output_dir OUT
"""

import lib.cli.starting  # noqa: F401  (before all else: Ctrl-C is one line from here on)

# isort: split
import argparse
from pathlib import Path

from lib.cli import checks, flags, types
from lib.cli.exit_status import end_script, importing
from lib.config import sources
from lib.config.gradients import GradientSettings
from lib.config.methods import ALLOCATORS, PRUNERS, UNSTRUCTURED, Method, Pattern, parse_method
from lib.config.mixture import Mixture, check_evaluation_text, parse_mixture
from lib.config.presets import ALP_PRESETS
from lib.config.quantization import Quantization
from lib.config.sparsity import SparsityPruning
from lib.config.tasks import ZERO_SHOT_TASKS, expand_sets, flag_of
from lib.errors import InputError
from lib.storage import log_tsv
from lib.storage.atomic import check_writable
from lib.storage.model_folder import is_gguf_target
from lib.storage.state_folder import check_state_folder

AXES = ("model", "prune_method", "sparsity_ratio", "sparsity_type", "seed")
WBITS = (*range(2, 9), 16)


def build_parser() -> flags.Parser:
    """The parser of all flags."""
    methods = flags.list_methods("pruners:", PRUNERS) + flags.list_methods("\nallocators:", ALLOCATORS)
    parser = flags.Parser(description=__doc__, epilog=methods)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=types.name,
        nargs="+",
        default=["demo"],
        help="hub id, local folder or GGUF file, or several (default: the bundled demo model)",
    )
    group.add_argument(
        "--model_name", type=types.name, help="its name in output paths and logs (default: from --model)"
    )
    group.add_argument("--cache_dir", type=types.folder, help="folder for the hub's files (default: the hub's own)")
    add_pruning_flags(parser.add_argument_group("pruning"))
    add_allocation_flags(parser.add_argument_group("ALP: how much of each layer"))
    add_quantization_flags(parser.add_argument_group("quantization"))
    group = parser.add_argument_group("text")
    group.add_argument("--nsamples", type=types.positive, default=128, help="calibration windows (default: 128)")
    group.add_argument(
        "--calibration_dataset",
        type=types.name,
        nargs="+",
        help=f"calibration text: {flags.CALIBRATION_TEXTS} (default: c4; demo for the demo model)",
    )
    group.add_argument(
        "--dataset",
        "--eval_datasets",
        type=types.name,
        nargs="+",
        help="evaluation texts (default: wikitext2; demo for the demo model)",
    )
    six = " ".join(ZERO_SHOT_TASKS)
    group.add_argument("--eval_zero_shot", action="store_true", help=f"the same as --tasks {six}")
    flags.add_tasks(group, "none, or the six of --eval_zero_shot")
    flags.add_shared_flags(parser)
    group = parser.add_argument_group("saving")
    group.add_argument("--save_model", type=types.folder, help="folder for the pruned model")
    group.add_argument(
        "--save_log", action="store_true", help=f"append a row to {log_tsv.FILE} in the folder of --save"
    )
    group.add_argument(
        "--save", type=types.folder, help="results folder; given, it asks for --save_log (default: results)"
    )
    flags.add_preset(parser, ALP_PRESETS)
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked as far as they alone allow. Raises `InputError`."""
    args, given = flags.parse_with_preset(build_parser(), ALP_PRESETS, arguments)
    args.ratio_is_given = "sparsity_ratio" in given  # and not only by the preset
    args.tasks = expand_sets(args.tasks or (ZERO_SHOT_TASKS if args.eval_zero_shot else ()))
    args.prune_method = [parse_method(name).name for name in args.prune_method]
    if args.model_name and len(args.model) > 1:
        raise InputError("--model_name: is the name of one model; leave it out")
    return args


def add_pruning_flags(group) -> None:
    group.add_argument(
        "--prune_method",
        type=types.name,
        nargs="+",
        default=["wanda_alp"],
        help="dense, or magnitude, wanda, sparsegpt, admm, ria, each alone or with _alp, _owl, _dlp or _atp",
    )
    group.add_argument(
        "--sparsity_ratio", type=types.share, nargs="+", help="share of the weights that goes (default: 0.7, or n/m)"
    )
    group.add_argument(
        "--sparsity_type",
        type=types.pattern,
        nargs="+",
        default=[UNSTRUCTURED],
        help="unstructured, or n:m such as 2:4 or 4:8",
    )
    group.add_argument(
        "--semi_structured", action="store_true", help="2:4: evaluate in torch's sparse kernels (recent NVIDIA GPUs)"
    )
    group.add_argument("--use_variant", action="store_true", help="wanda: a share of the score's sum goes in each row")
    group.add_argument(
        "--a",
        type=types.up_to_10,
        default=PRUNERS["ria"].flags["a"],
        help="ria: power of the input norms (default: %(default)s)",
    )
    group.add_argument(
        "--percdamp",
        type=types.up_to_10,
        default=PRUNERS["sparsegpt"].flags["percdamp"],
        help="sparsegpt, gptq: share of the mean diagonal (default: 0.01)",
    )


def add_allocation_flags(group) -> None:
    group.add_argument(
        "--alpha", type=types.at_most_1, help="densities differ by 2 alpha at most (default: 0.15; owl, atp 0.08)"
    )
    group.add_argument(
        "--owl_m",
        type=types.above_0,
        default=ALLOCATORS["owl"].flags["owl_m"],
        help="owl: an outlier is so many times the mean (default: %(default)g)",
    )
    flags.add_gradient_flags(group, "--grad_nsamples")
    group.add_argument("--grad_seed", type=types.count, default=0, help="seed of the gradients' windows (default: 0)")
    group.add_argument(
        "--gradients",
        type=types.folder,
        help="file of save_gradient.py, whatever its settings (default: found by them)",
    )


def add_quantization_flags(group) -> None:
    group.add_argument(
        "--wbits",
        type=types.count,
        choices=WBITS,
        metavar="2..8|16",
        default=16,
        help="bits of a weight (default: 16, none)",
    )
    group.add_argument("--gptq", action="store_true", help="round with error compensation; sparsegpt always does")
    group.add_argument("--sym", action="store_true", help="grids symmetric about zero")
    group.add_argument(
        "--groupsize", type=types.group_size, help="columns that share a scale (default: -1, a whole row)"
    )
    group.add_argument("--act-order", action="store_true", help="gptq: columns of large inputs first")
    group.add_argument("--static-groups", action="store_true", help="gptq: the scales of groups are set beforehand")


def check(args: argparse.Namespace) -> None:
    """Checks everything that needs no torch, except what each run checks itself. Raises `InputError`."""
    for model in args.model:
        sources.check_model(model)
    if is_gguf_target(args.save_model):
        advice = "give a folder, and convert that with convert_hf_to_gguf.py of llama.cpp"
        raise InputError(f"--save_model {args.save_model}: zeros are not saved as GGUF; {advice}")
    if args.tasks:
        checks.check_lm_eval(flag_of(args.tasks))
    name = args.model_name or "-"
    if "/" in name or name in (".", "..") or not name.isprintable():
        raise InputError(f"--model_name {name}: is used in file names; give one without slashes and line ends")
    checks.check_device(args)
    for source in args.dataset or ():
        check_evaluation_text("--dataset", source)
    used_texts = {
        source for model in args.model for source in (*calibration(args, model).read, *eval_texts(args, model))
    }
    for source in sorted(used_texts):
        sources.check_text(source)
    outputs = {"--output_dir": args.output_dir or Path("runs"), "--save_model": args.save_model}
    checks.check_apart(outputs | {"--save": log_folder_of(args)}, used_texts)
    if checks.is_grid(args, AXES):
        checks.check_grid_output(args)
    else:
        files = [path for path in (args.gradients, log_folder_of(args)) if path] + checks.check_prompts(args)
        checks.check_output(args, [*args.model, *used_texts, *args.tasks, *files])
    if args.gradients and len(args.model) > 1:
        raise InputError("--gradients: are of one model; leave them out, or give one model")
    if log_folder := log_folder_of(args):
        check_writable(log_folder, "--save")
        log_tsv.check(log_folder)
    if any(map(sources.is_hub_model, args.model)) or any(map(sources.is_hub_text, used_texts)) or args.tasks:
        checks.prefer_cache_without_network()


def calibration(args: argparse.Namespace, model: str) -> Mixture:
    default = "demo" if sources.is_demo(model) else "c4"
    return parse_mixture("--calibration_dataset", args.calibration_dataset or [default])


def eval_texts(args: argparse.Namespace, model: str) -> list[str]:
    return list(dict.fromkeys(args.dataset or (["demo"] if sources.is_demo(model) else ["wikitext2"])))


def log_folder_of(args: argparse.Namespace) -> Path | None:
    return (args.save or Path("results")) if args.save or args.save_log else None


def cells(args: argparse.Namespace) -> list[dict]:
    """The settings of each run that are not flags as they stand. Raises `InputError`."""
    methods = list(dict.fromkeys(parse_method(name) for name in args.prune_method))
    found = [
        cell(args, model, seed, method, pattern, ratio)
        for model in dict.fromkeys(args.model)
        for seed in args.seed
        for method in methods
        for pattern in args.sparsity_type
        for ratio in check_ratios(args, pattern)
    ]
    if args.use_variant and not any(one["use_variant"] for one in found):
        raise InputError("--use_variant: is a way of wanda to prune unstructured; leave it out")
    for one in found:
        if args.semi_structured and (str(one["pattern"]) != "2:4" or not one["method"].pruning.prunes):
            raise InputError("--semi_structured: the kernels are for 2:4 sparse weights; add --sparsity_type 2:4")
    if args.gradients and not any(uses_gradients(one) for one in found):
        asked = f"{' '.join(args.prune_method)} {' '.join(map(str, args.sparsity_type))}"
        raise InputError(f"--gradients: {asked} does not use them; leave them out")
    for one in found:
        if uses_gradients(one) and not args.gradients:
            path = one["gradients"].path(one["source"].name, args.dtype)
            check_writable(path.parent, "gradients")
            check_state_folder(path.with_suffix(".state"), "gradients")
            checks.check_apart({"gradients": path}, [*one["calibration_dataset"].read, *one["dataset"]])
    return found


def uses_gradients(one: dict) -> bool:
    allocation = one["method"].allocation
    return allocation is not None and allocation.needs == "gradients" and not one["pattern"].is_structured


def cell(args: argparse.Namespace, model: str, seed: int, method: Method, pattern: Pattern, ratio: float) -> dict:
    """The settings of one run. Raises `InputError`."""
    text = calibration(args, model)
    return {
        "source": flags.model_source(args, model),
        "model_name": args.model_name or sources.short_name(model),
        "calibration_dataset": text,
        "dataset": eval_texts(args, model),
        "seed": seed,
        "method": method,
        "alpha": (method.allocation.flags["alpha"] if method.allocation else 0.0) if args.alpha is None else args.alpha,
        "pattern": pattern,
        "sparsity_ratio": ratio,
        "use_variant": args.use_variant and method.pruning.takes("use_variant") and not pattern.is_structured,
        "quantization": check_quantization(args, method, pattern),
        "gradients": GradientSettings(
            text, args.grad_nsamples, args.grad_seqlen, args.grad_loss, args.grad_type, args.grad_seed
        ),
        "gradient_file": args.gradients,
        "log": log_folder_of(args),
    }


def check_ratios(args: argparse.Namespace, pattern: Pattern) -> list[float]:
    """The sparsity ratios asked for with a pattern; n:m fixes its own. Raises `InputError`."""
    ratios = args.sparsity_ratio or []
    if not pattern.is_structured:
        return list(dict.fromkeys(ratios or [0.7]))
    own = pattern.n / pattern.m
    off = [ratio for ratio in ratios if abs(ratio - own) > 0.005]
    if off and args.ratio_is_given and UNSTRUCTURED not in args.sparsity_type:
        share = f"{own:.4g}"
        raise InputError(f"--sparsity_ratio {off[0]:g}: --sparsity_type {pattern} prunes {share}; leave the ratio out")
    return [own]


def check_quantization(args: argparse.Namespace, method: Method, pattern: Pattern) -> Quantization | None:
    """The quantization that the flags ask for, or None. Raises `InputError`."""
    asked = {
        "--gptq": args.gptq,
        "--sym": args.sym,
        "--groupsize": args.groupsize is not None,
        "--act-order": args.act_order,
        "--static-groups": args.static_groups,
    }
    given = [flag for flag, is_given in asked.items() if is_given]
    if args.wbits == 16:
        if given:
            raise InputError(f"{given[0]}: nothing is quantized without --wbits 2 to 8")
        return None
    is_compensated = args.gptq or method.pruning.rounds_while_pruning
    for flag in ("--act-order", "--static-groups"):
        if flag in given and not is_compensated:
            raise InputError(f"{flag}: needs --gptq")
    if args.static_groups and args.groupsize is None:
        raise InputError("--static-groups: needs --groupsize")
    if args.act_order and method.pruning.rounds_while_pruning and pattern.is_structured:
        raise InputError(f"--act-order: takes apart the neighbours of {pattern}; leave it out with {method.pruner}")
    return Quantization(args.wbits, is_compensated, args.sym, args.groupsize, args.act_order, args.static_groups)


def main() -> None:
    args = parse()
    is_grid = checks.is_grid(args, AXES)
    if is_grid:
        args.output_dir = args.output_dir or checks.grid_output_dir("alp_prune", args)
    check(args)
    runs = cells(args)
    with importing():
        from lib.runs.grid import run_grid  # these import torch
        from lib.runs.single import run_single
        from lib.sparsity.run import SparsityRun

    shared = {name: value for name, value in vars(args).items() if name in SparsityPruning.__dataclass_fields__}
    settings = [SparsityPruning(**{**shared, **one}) for one in runs]
    if is_grid:
        run_grid(SparsityRun, settings, args.output_dir, args.overwrite)
    else:
        run_single(SparsityRun, settings[0])


def command() -> None:
    """Entry point of the script and of the installed console script."""
    end_script("alp_prune.py", main)


if __name__ == "__main__":
    command()
