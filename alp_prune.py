#!/usr/bin/env python3
"""ALP: prunes the weights of a language model, each layer to a sparsity of its own, without training.

Connection sensitivity (save_gradient.py, or computed here) says how much of each layer stays; Magnitude, Wanda,
SparseGPT or RIA say which weights. Then perplexity is measured, and the model saved.

    python alp_prune.py                                                  # bundled demo model and text
    python alp_prune.py --model Enoch/llama-7b-hf --prune_method wanda_alp --sparsity_ratio 0.7 --save_log
    python alp_prune.py --model PATH --prune_method sparsegpt --sparsity_type 2:4 --save_model OUT
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from lib import cli, log, names
from lib.errors import InputError
from lib.files import check_writable
from lib.methods import ALPHAS, DENSE, ZERO_SHOT_TASKS, GradientSettings, Quantization, parse_method

WBITS = (*range(2, 9), 16)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=cli.name, default="demo", help="hub id or local folder (default: the bundled demo model)"
    )
    group.add_argument("--model_name", type=cli.name, help="its name in output paths and logs (default: from --model)")
    group.add_argument("--cache_dir", type=cli.folder, help="folder for the hub's files (default: the hub's own)")
    add_pruning_flags(parser.add_argument_group("pruning"))
    add_allocation_flags(parser.add_argument_group("ALP: how much of each layer"))
    add_quantization_flags(parser.add_argument_group("quantization"))
    group = parser.add_argument_group("text")
    text = "c4, wikitext2, demo, a hub id, or a .txt/.json/.jsonl/.parquet file or folder"
    group.add_argument("--nsamples", type=cli.positive, default=128, help="calibration windows (default: 128)")
    group.add_argument(
        "--calibration_dataset", type=cli.name, help=f"calibration text: {text} (default: c4; demo for the demo model)"
    )
    group.add_argument(
        "--dataset", type=cli.name, nargs="+", help="evaluation texts (default: wikitext2; demo for the demo model)"
    )
    group.add_argument("--eval_zero_shot", action="store_true", help="measure zero-shot accuracy (needs lm-eval)")
    group.add_argument(
        "--tasks",
        type=cli.name,
        nargs="+",
        help=f"of lm_eval: names or YAML files (default: {' '.join(ZERO_SHOT_TASKS)})",
    )
    cli.add_shared_flags(parser)
    group = parser.add_argument_group("saving")
    group.add_argument("--save_model", type=cli.folder, help="folder for the pruned model")
    group.add_argument("--save_log", action="store_true", help=f"append a row to {log.FILE} in the folder of --save")
    group.add_argument(
        "--save", type=cli.folder, help="results folder; given, it asks for --save_log (default: results)"
    )
    args = parser.parse_args(arguments)
    is_demo = names.is_demo(args.model)
    args.model_name = args.model_name or names.short_name(args.model)
    args.calibration_dataset = args.calibration_dataset or ("demo" if is_demo else "c4")
    args.dataset = list(dict.fromkeys(args.dataset or (["demo"] if is_demo else ["wikitext2"])))
    return args


def add_pruning_flags(group) -> None:
    group.add_argument(
        "--prune_method",
        default="wanda_alp",
        help="dense, or magnitude, wanda, sparsegpt, ria, each alone or with _alp, _owl or _dlp",
    )
    group.add_argument("--sparsity_ratio", type=cli.share, help="share of the weights that goes (default: 0.7, or n/m)")
    group.add_argument(
        "--sparsity_type", type=cli.pattern, default="unstructured", help="unstructured, or n:m such as 2:4 or 4:8"
    )
    group.add_argument(
        "--semi_structured", action="store_true", help="2:4: evaluate in torch's sparse kernels (recent NVIDIA GPUs)"
    )
    group.add_argument("--use_variant", action="store_true", help="wanda: a share of the score's sum goes in each row")
    group.add_argument("--a", type=cli.up_to_10, default=0.5, help="ria: power of the input norms (default: 0.5)")
    group.add_argument(
        "--percdamp",
        type=cli.up_to_10,
        default=0.01,
        help="sparsegpt, gptq: share of the mean diagonal (default: 0.01)",
    )


def add_allocation_flags(group) -> None:
    group.add_argument(
        "--alpha", type=cli.at_most_1, help="densities differ by 2 alpha at most (default: 0.15; owl 0.08)"
    )
    group.add_argument(
        "--owl_m", type=cli.above_0, default=5.0, help="owl: an outlier is so many times the mean (default: 5)"
    )
    cli.add_gradient_flags(group, "--grad_nsamples")
    group.add_argument(
        "--gradients", type=cli.folder, help="file of save_gradient.py (default: found by model and settings)"
    )


def add_quantization_flags(group) -> None:
    group.add_argument(
        "--wbits", type=int, choices=WBITS, metavar="2..8|16", default=16, help="bits of a weight (default: 16, none)"
    )
    group.add_argument("--gptq", action="store_true", help="round with error compensation; sparsegpt always does")
    group.add_argument("--sym", action="store_true", help="grids symmetric about zero")
    group.add_argument("--groupsize", type=cli.group_size, help="columns that share a scale (default: -1, a whole row)")
    group.add_argument("--act-order", action="store_true", help="gptq: columns of large inputs first")
    group.add_argument("--static-groups", action="store_true", help="gptq: the scales of groups are set beforehand")


def check(args: argparse.Namespace) -> dict:
    """All that can be checked before torch is imported; returns what the flags mean together, by setting."""
    names.check_model(args.model)
    method = parse_method(args.prune_method)
    ratio = check_sparsity(args, method)
    quantization = check_quantization(args, method)
    if args.tasks and not args.eval_zero_shot:
        raise InputError("--tasks: needs --eval_zero_shot")
    if args.eval_zero_shot and importlib.util.find_spec("lm_eval") is None:
        raise InputError("--eval_zero_shot: lm_eval is not installed; pip install lm-eval")
    if "/" in args.model_name or args.model_name in (".", ".."):
        raise InputError(f"--model_name {args.model_name}: is used in file names; give one without slashes")
    cli.check_device(args)
    sources = [args.calibration_dataset, *args.dataset]
    for source in sources:
        names.check_text(source)
    cli.check_output(args, args.model)
    gradients = GradientSettings(
        args.calibration_dataset, args.grad_nsamples, args.grad_seqlen, args.grad_loss, args.grad_type, args.seed
    )
    if method.allocator == "alp" and not args.gradients:
        check_writable(gradients.path(args.model, args.dtype).parent, "gradients")
    if args.gradients and (method.allocator != "alp" or args.sparsity_type.is_structured):
        raise InputError(f"--gradients: {args.prune_method} {args.sparsity_type} does not use them; leave them out")
    log_folder = (args.save or Path("results")) if args.save or args.save_log else None
    if log_folder:
        check_writable(log_folder, "--save")
        log.check(log_folder)
    if names.is_hub_model(args.model) or any(map(names.is_hub_text, sources)) or args.eval_zero_shot:
        cli.prefer_cache_without_network()
    return {
        "source": cli.model_source(args, args.model),
        "method": method,
        "alpha": ALPHAS.get(method.allocator, 0.0) if args.alpha is None else args.alpha,
        "pattern": args.sparsity_type,
        "sparsity_ratio": ratio,
        "quantization": quantization,
        "gradients": gradients,
        "gradient_file": args.gradients,
        "log": log_folder,
        "tasks": tuple(args.tasks or ZERO_SHOT_TASKS) if args.eval_zero_shot else (),
    }


def check_sparsity(args: argparse.Namespace, method) -> float:
    """The sparsity ratio that ratio and pattern give together."""
    pattern, ratio = args.sparsity_type, args.sparsity_ratio
    if args.use_variant and (method.pruner != "wanda" or pattern.is_structured):
        raise InputError("--use_variant: is a way of wanda to prune unstructured; leave it out")
    if args.semi_structured and (str(pattern) != "2:4" or method.pruner == DENSE):
        raise InputError("--semi_structured: the kernels are for 2:4 sparse weights; add --sparsity_type 2:4")
    if not pattern.is_structured:
        return 0.7 if ratio is None else ratio
    if ratio is not None and abs(ratio - pattern.n / pattern.m) > 0.005:
        share = f"{pattern.n / pattern.m:.4g}"
        raise InputError(f"--sparsity_ratio {ratio:g}: --sparsity_type {pattern} prunes {share}; leave the ratio out")
    return pattern.n / pattern.m


def check_quantization(args: argparse.Namespace, method) -> Quantization | None:
    """The quantization that the flags ask for together; None for none."""
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
    is_compensated = args.gptq or method.pruner == "sparsegpt"
    for flag in ("--act-order", "--static-groups"):
        if flag in given and not is_compensated:
            raise InputError(f"{flag}: needs --gptq")
    if args.static_groups and args.groupsize is None:
        raise InputError("--static-groups: needs --groupsize")
    if args.act_order and method.pruner == "sparsegpt" and args.sparsity_type.is_structured:
        raise InputError(
            f"--act-order: takes apart the neighbours of {args.sparsity_type}; leave it out with sparsegpt"
        )
    return Quantization(args.wbits, is_compensated, args.sym, args.groupsize, args.act_order, args.static_groups)


def main() -> None:
    args = parse()
    settings = check(args)
    args.output_dir = args.output_dir or cli.default_output_dir("alp_prune", args.model_name)
    from lib.alp import SparsityPruning, run  # imports torch

    same = {name: value for name, value in vars(args).items() if name in SparsityPruning.__dataclass_fields__}
    run(SparsityPruning(**{**same, **settings}))


if __name__ == "__main__":
    sys.exit(cli.run("alp_prune.py", main))
