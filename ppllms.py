#!/usr/bin/env python3
"""PP-LLMs: depth pruning of a language model in two stages, without training.

Block Influence picks the layers that lose their FFN; a greedy search picks which of them lose their attention too. Then
perplexity is measured and a smaller model saved.

    python ppllms.py                                                     # bundled demo model and text
    python ppllms.py --model_name meta-llama/Llama-2-13b-hf --num_blocks 40 --prune_rate 0.25
    python ppllms.py --model_name PATH --mha_remove_layers 10 --ffn_remove_layers 10 --save_model OUT

Several methods, rates, models or seeds make a table; the same command resumes a stopped one:

    python ppllms.py --preset demo
    python ppllms.py --model_name PATH --method ppllms blockpruner beam --prune_rate 0.15 0.25 --output_dir OUT

Damage is taken back in closed form, by refitting the output projections that stay (slower, much better models):

    python ppllms.py --compensate all
    python ppllms.py --model_name PATH --compensate all --compensate_dataset c4:3 wikitext2:1

A plan from an earlier run can be applied again, to the model or to a GGUF file of it:

    python ppllms.py --apply_plan runs/.../result.json --save_model OUT
    python ppllms.py --apply_plan runs/.../result.json --gguf IN.gguf OUT.gguf
"""

import lib.cli.starting  # noqa: F401  (before all else: Ctrl-C is one line from here on)

# isort: split
import argparse
from pathlib import Path

from lib.cli import checks, flags, types
from lib.cli.exit_status import end_script, importing
from lib.config import sources
from lib.config.depth import COMPENSATIONS, DepthPruning
from lib.config.methods import DEPTH_METHODS
from lib.config.mixture import Mixture, check_evaluation_text, parse_mixture
from lib.config.plan import SavedPlan, read_plan
from lib.config.presets import DEPTH_PRESETS
from lib.config.tasks import expand_sets
from lib.errors import InputError, printable
from lib.export import gguf
from lib.export.gguf_changed import Trained
from lib.storage.model_folder import is_gguf_target
from lib.storage.output_folder import PLAN, RESULT, find_plan

SAVE_FORMATS = ("hf", "masked", "nemotron-nas")
OF_THE_SEARCH = ("num_blocks", "prune_rate", "mha_remove_layers", "ffn_remove_layers", "mha_ffn_ratio")
OF_THE_SEARCH += ("nsamples", "dataset", "bi_windows", "seed", "method", "beam_width", "preset")
COUNTS = ("mha_remove_layers", "ffn_remove_layers")
OF_COMPENSATION = {"seed": None, "dataset": "compensate_dataset", "nsamples": "compensate_nsamples"}
# flags that a compensation uses too; the last two only without a flag of its own
AXES = ("model_name", "method", "prune_rate", "seed")
OF_A_GGUF = ("apply_plan", "gguf", "gguf_weights", "overwrite")


def build_parser() -> flags.Parser:
    """The parser of all flags."""
    parser = flags.Parser(description=__doc__, epilog=flags.list_methods("methods:", DEPTH_METHODS))
    add_budget_flags(parser.add_argument_group("model and budget"))
    add_text_flags(parser.add_argument_group("text"))
    flags.add_shared_flags(parser)
    add_compensation_flags(parser.add_argument_group("compensation"))
    group = parser.add_argument_group("saving")
    group.add_argument(
        "--save_model", type=types.folder, help="folder for the pruned model, or FILE.gguf from a GGUF file"
    )
    group.add_argument(
        "--save_format",
        **flags.one_of(SAVE_FORMATS),
        default="hf",
        help="default: hf (compact)",
    )
    group = parser.add_argument_group("applying a plan")
    group.add_argument(
        "--apply_plan",
        type=types.folder,
        help="output folder or file of an earlier run, or TABLE#ROW: prune by its plan",
    )
    group.add_argument(
        "--gguf", type=types.folder, nargs=2, metavar=("IN", "OUT"), help="prune a GGUF file by the plan, for llama.cpp"
    )
    group.add_argument(
        "--gguf_weights",
        type=types.folder,
        help="with --gguf: folder that has all weights, of the pruned model after a training by any tool",
    )
    flags.add_preset(parser, DEPTH_PRESETS)
    return parser


def add_budget_flags(group) -> None:
    group.add_argument(
        "--model_name",
        "--model",
        type=types.name,
        nargs="+",
        help="hub id, local folder or GGUF file, or several (default: the bundled demo, or that of the plan)",
    )
    group.add_argument("--cache_dir", type=types.folder, help="folder for the hub's files (default: the hub's own)")
    group.add_argument(
        "--method",
        **flags.one_of(DEPTH_METHODS),
        nargs="+",
        default=["ppllms"],
        help="how to choose (default: ppllms)",
    )
    group.add_argument("--num_blocks", type=types.positive, help="decoder layers, checked against the model")
    group.add_argument(
        "--prune_rate",
        type=types.between_0_and_1,
        nargs="+",
        default=[0.25],
        help="share of all parameters to remove, or several (default: 0.25)",
    )
    group.add_argument("--mha_remove_layers", type=types.count, help="layers to lose attention (default: automatic)")
    group.add_argument("--ffn_remove_layers", type=types.count, help="layers to lose their FFN (default: automatic)")
    group.add_argument(
        "--mha_ffn_ratio",
        type=types.ratio,
        default=DEPTH_METHODS["ppllms"].flags["mha_ffn_ratio"],
        help="FFN layers for each attention, or auto (default: 2.0)",
    )
    group.add_argument(
        "--beam_width",
        type=types.positive,
        default=DEPTH_METHODS["beam"].flags["beam_width"],
        help="beam: plans kept for each amount removed (default: 1)",
    )


def add_text_flags(group) -> None:
    group.add_argument("--nsamples", type=types.positive, default=128, help="calibration documents (default: 128)")
    group.add_argument(
        "--dataset",
        "--calibration_dataset",
        type=types.name,
        nargs="+",
        help=f"calibration text: {flags.CALIBRATION_TEXTS} (default: c4; demo for the demo model)",
    )
    group.add_argument("--bi_windows", type=types.positive, help="windows that BI is averaged over (default: all)")
    group.add_argument(
        "--eval_ppl", type=types.boolean, default=True, nargs="?", const=True, help="measure perplexity (default: True)"
    )
    group.add_argument(
        "--eval_datasets", type=types.name, nargs="+", help="evaluation texts (default: wikitext2; demo for the demo)"
    )
    flags.add_tasks(group, "none")


def add_compensation_flags(group) -> None:
    group.add_argument(
        "--compensate",
        **flags.one_of(COMPENSATIONS),
        default="none",
        help="refit the output projections before gaps, or all from the first gap on (default: none)",
    )
    group.add_argument(
        "--compensate_dataset", type=types.name, nargs="+", help="its calibration text (default: that of --dataset)"
    )
    group.add_argument(
        "--compensate_nsamples", type=types.positive, help="its calibration documents (default: those of --nsamples)"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked as far as they alone allow. Raises `InputError`."""
    args, given = flags.parse_with_preset(build_parser(), DEPTH_PRESETS, arguments)
    check_together(args, given)
    args.apply_plan, row = find_plan(args.apply_plan) if args.apply_plan else (None, None)
    args.saved_plan = read_plan(args.apply_plan, row) if args.apply_plan else None
    if args.gguf and args.saved_plan.plan.experts_removed:
        raise InputError("--gguf: the plan removes experts, which is done in folders only; leave --gguf out")
    args.tasks = expand_sets(args.tasks or ())
    if is_gguf_target(args.save_model):
        args.save_format = "gguf"
    args.model_name = args.model_name or [args.saved_plan.model if args.saved_plan else "demo"]
    return args


def check_together(args: argparse.Namespace, given: set[str]) -> None:
    """Raises `InputError` for flags that have no effect together with others."""
    if args.gguf and not args.apply_plan:
        raise InputError("--gguf: needs --apply_plan, the result.json of a run on the unpruned model")
    if args.gguf_weights and not args.gguf:
        raise InputError("--gguf_weights: needs --gguf IN OUT, the files for llama.cpp")
    is_compensated = args.compensate != "none"
    used_by_compensation = {name for name, own in OF_COMPENSATION.items() if is_compensated and own not in given}
    for name in sorted(given):
        if args.gguf and name not in OF_A_GGUF:
            raise InputError(f"--{name}: has no meaning with --gguf, which applies a plan to a file; leave it out")
        if name in used_by_compensation:
            continue
        takers = [method.name for method in DEPTH_METHODS.values() if method.takes(name)]
        if name in COUNTS and not set(args.method) <= set(takers):
            raise InputError(f"--{name}: is of --method {' '.join(takers)}; others go by --prune_rate; leave it out")
        if takers and not set(args.method) & set(takers):
            raise InputError(f"--{name}: --method {' '.join(args.method)} has no use for it; leave it out")
        if args.apply_plan and name in OF_THE_SEARCH:
            raise InputError(f"--{name}: has no meaning with --apply_plan, which searches nothing; leave it out")
    for name in ("compensate_dataset", "compensate_nsamples"):
        if name in given and not is_compensated:
            raise InputError(f"--{name}: needs --compensate nearest or all")
    if len(args.prune_rate) > 1 and None not in (args.mha_remove_layers, args.ffn_remove_layers):
        raise InputError("--prune_rate: with both counts given the rate has no effect; give one, or none")
    if args.apply_plan and len(args.model_name or ()) > 1:
        raise InputError("--model_name: a plan is applied to one model; give one")
    if "save_format" in given and not args.save_model:
        raise InputError("--save_format: needs --save_model")
    if "save_format" in given and is_gguf_target(args.save_model):
        raise InputError("--save_format: has no meaning for --save_model FILE.gguf; leave it out")


def check_plan_stays(plan: Path, targets: dict[str, Path | None]) -> None:
    """Raises `InputError` when the plan is in a file or folder that would be replaced."""
    for flag, target in targets.items():
        if target and target.resolve() in (plan.resolve(), *plan.resolve().parents):
            raise InputError(f"{flag} {target}: would replace the plan {plan}; name another")


def cells(args: argparse.Namespace) -> list[dict]:
    """The settings in which the runs differ, one dict a run: model by model, seed by seed."""
    return [
        {"model_name": name, "seed": seed, "method": method, "prune_rate": rate, **texts(args, name)}
        for name in dict.fromkeys(args.model_name)
        for seed in args.seed
        for method in args.method
        for rate in args.prune_rate
    ]


def texts(args: argparse.Namespace, model: str) -> dict:
    """The texts of a run on a model: the given ones, or the defaults for that model."""
    is_demo = sources.is_demo(model)
    evaluation = args.eval_datasets or (["demo"] if is_demo else ["wikitext2"])
    dataset = parse_mixture("--dataset", args.dataset or ["demo" if is_demo else "c4"])
    own = parse_mixture("--compensate_dataset", args.compensate_dataset) if args.compensate_dataset else dataset
    return {
        "dataset": dataset,
        "compensate_dataset": own if args.compensate != "none" else Mixture(),
        "eval_datasets": list(dict.fromkeys(evaluation)),
    }


def check(args: argparse.Namespace) -> None:
    """Checks everything that needs no torch. Raises `InputError`."""
    for name in args.model_name:
        sources.check_model(name)
    mha, ffn = args.mha_remove_layers, args.ffn_remove_layers
    if mha is not None and ffn is not None and mha > ffn:
        raise InputError(
            f"--mha_remove_layers {mha} is more than --ffn_remove_layers {ffn}: "
            "attention is removed from layers that lose their FFN"
        )
    if is_gguf_target(args.save_model) and not sources.is_gguf(args.model_name[0]):
        what = f"--save_model {args.save_model}: prunes a GGUF file, and {args.model_name[0]} is none; give a folder"
        raise InputError(
            f"{what}, and prune a GGUF file of the model by the plan, with --apply_plan RESULT --gguf IN OUT"
        )
    if args.tasks:
        checks.check_lm_eval("--tasks")
    checks.check_device(args)
    needs_windows = not args.apply_plan and any(DEPTH_METHODS[method].needs_windows for method in args.method)
    for source in args.eval_datasets or ():
        check_evaluation_text("--eval_datasets", source)
    used_texts: dict[str, None] = {}
    for name in args.model_name:
        of_model = texts(args, name)
        searched = [(of_model["dataset"], args.nsamples)] if needs_windows else []
        for mixture, count in (*searched, (of_model["compensate_dataset"], args.compensate_nsamples or args.nsamples)):
            mixture.counts(count)
            used_texts |= dict.fromkeys(mixture.read)
        used_texts |= dict.fromkeys(of_model["eval_datasets"] if args.eval_ppl else [])
    for source in used_texts:
        sources.check_text(source)
    outputs = {"--output_dir": args.output_dir or Path("runs"), "--save_model": args.save_model}
    checks.check_apart(outputs, used_texts)
    if checks.is_grid(args, AXES):
        checks.check_grid_output(args)
        if not args.eval_ppl:
            raise InputError("--eval_ppl no: a table of runs is one of perplexities; leave it out")
    else:
        files = [*([args.apply_plan] if args.apply_plan else []), *checks.check_prompts(args)]
        checks.check_output(args, [*args.model_name, *used_texts, *args.tasks, *files])
    if args.apply_plan:
        for target in (args.output_dir / name for name in (RESULT, PLAN) if args.output_dir):
            check_plan_stays(args.apply_plan, {"--output_dir": target})
        check_plan_stays(args.apply_plan, {"--save_model": args.save_model})
    if any(map(sources.is_hub_model, args.model_name)) or any(map(sources.is_hub_text, used_texts)) or args.tasks:
        checks.prefer_cache_without_network()


def prune_gguf(source: Path, target: Path, saved: SavedPlan, weights: Path | None, overwrite: bool) -> None:
    """Writes a GGUF file without what the plan removes, and prints both sizes."""
    check_plan_stays(saved.path, {"--gguf": target})
    changed = Trained(weights, saved.plan) if weights else saved.changed
    found = gguf.apply_plan(source, target, saved.plan, overwrite, changed)
    print(printable(f"Plan        {saved.path}, found for {saved.model}"))
    for what, size in (("GGUF", found.before), ("pruned", found.after)):
        name = f"{source} ({found.architecture})" if what == "GGUF" else f"{target} (deci)"
        sizes = f"{size.layers} layers, {size.parameters:,} parameters, {size.bytes / 2**20:,.1f} MiB"
        print(printable(f"{what:<12}{name}: {sizes}"))
    if folder := weights or (saved.changed and saved.changed.folder):
        where = f"{found.changed.total()} tensors from {folder}"
        print(printable(f"Changed     {where}: {found.changed_types}"))
    if not saved.fits(found.before.parameters):
        print(f"Note        the plan's model has {saved.parameters:,} parameters: is this file another model's?")


def main() -> None:
    args = parse()
    if args.gguf:
        prune_gguf(*args.gguf, args.saved_plan, args.gguf_weights, args.overwrite)
        return
    is_grid = checks.is_grid(args, AXES)
    if is_grid:
        args.output_dir = args.output_dir or checks.grid_output_dir("ppllms", args)
    check(args)
    with importing():
        from lib.depth.run import DepthRun  # these import torch
        from lib.runs.grid import run_grid
        from lib.runs.single import run_single

    shared = {name: value for name, value in vars(args).items() if name in DepthPruning.__dataclass_fields__}
    runs = [
        DepthPruning(flags.model_source(args, cell.pop("model_name")), **{**shared, **cell}) for cell in cells(args)
    ]
    if is_grid:
        run_grid(DepthRun, runs, args.output_dir, args.overwrite)
    else:
        run_single(DepthRun, runs[0])


def command() -> None:
    """Entry point of the script and of the installed console script."""
    end_script("ppllms.py", main)


if __name__ == "__main__":
    command()
