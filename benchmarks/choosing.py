"""Which method, how much of it, and calibrated on what, on one model.

    python -m benchmarks.choosing demo OUT --calibration demo --evaluation demo
    python -m benchmarks.choosing MODEL OUT --calibration c4 wikitext2 --evaluation c4 wikitext2 --seqlen 512

Every part is a run or a table of one of the two scripts, in a folder of its own below OUT: what is finished is not run
again, so the same command goes on where it was stopped. OUT/choosing.md has all results with their distance to the
dense model, perplexities, size and speed. Speed is that of the layers on a window, each pruned model in turn with the
dense one.

For each plan of PP-LLMs there is also what each removed FFN costs: the loss of calibration text without it alone, and
under the plan with it put back.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.common import machine, seconds
from lib.config.plan import Mode, Plan
from lib.config.sources import ModelSource, labels
from lib.data.corpora import load_corpus
from lib.data.sampling import calibration_windows
from lib.depth.trial_losses import Sweep, Trial
from lib.models.decoder import Decoder
from lib.models.loading import load_model, load_tokenizer
from lib.reporting.entries import entries
from lib.runtime.batching import Batcher
from lib.runtime.setup import set_up
from lib.storage.output_folder import RESULT, RESULTS

ROOT = Path(__file__).resolve().parents[1]
RATES, SPARSITIES = ["0.1", "0.2", "0.25"], ["0.5", "0.6", "0.7"]
DEPTH = ["ppllms", "shortgpt", "sleb", "blockpruner"]
SPARSITY = ["magnitude", "wanda", "ria", "sparsegpt", "admm", "wanda_alp", "sparsegpt_alp", "admm_alp", "admm_atp"]


def commands(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """All runs: below which folder, and a script of the project with its flags."""
    text, nsamples, more = args.calibration[:1], [str(args.nsamples)], [str(4 * args.nsamples)]
    depth = ["ppllms.py", "--model_name", args.model, "--eval_datasets", *args.evaluation, "--dataset", *text]
    refit = ["--compensate", "all", "--compensate_nsamples", str(args.compensate_nsamples)]
    sparsity = ["alp_prune.py", "--model", args.model, "--dataset", *args.evaluation, "--calibration_dataset"]
    uniform = [method for method in args.sparsity if "_" not in method]
    search = [*depth, "--nsamples", *nsamples]
    yield "depth", [*search, "--method", *args.depth, "--prune_rate", *RATES]
    for name, plan in plans(args):
        yield f"depth-compensated/{name}", [*depth, *refit, "--apply_plan", str(plan)]
    of_text = [*sparsity, *text, "--nsamples"]
    yield "sparsity", [*of_text, *nsamples, "--prune_method", *args.sparsity, "--sparsity_ratio", *SPARSITIES]
    yield "sparsity-2-4", [*of_text, *nsamples, "--prune_method", *uniform, "--sparsity_type", "2:4"]

    at_20 = ["--prune_rate", "0.2"]
    at_60 = ["--sparsity_ratio", "0.6", "--prune_method", "sparsegpt", "wanda_alp"]
    for name, texts in {"self": ["self"], "mixed": args.calibration}.items():
        if name == "self" or len(texts) > 1:
            yield f"depth-texts/{name}", [*search, *at_20, *refit, "--compensate_dataset", *texts]
            yield f"sparsity-texts/{name}", [*sparsity, *texts, "--nsamples", *nsamples, *at_60]
    yield "depth-many", [*depth, "--nsamples", *more, "--prune_rate", RATES[-1]]
    yield "sparsity-many", [*of_text, *more, *at_60]
    yield "depth-seeds", [*search, *at_20, "--seed", "1", "2"]
    yield "sparsity-seeds", [*of_text, *nsamples, *at_60, "--seed", "1", "2"]


def plans(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """The plans of the part `depth` that are compensated: a name for each, and its file."""
    for result in results(args.output / "depth"):
        name = f"{result['method']}-{result['parameters']['target_rate']:g}"
        if result["method"] in (args.refit or args.depth):
            path = args.output / "plans" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(result), encoding="utf-8")
            yield name, path


def run(command: Sequence[str], folder: Path, args: argparse.Namespace) -> None:
    """Runs one command; what is finished in its folder stays."""
    windows = [] if args.seqlen is None else ["--seqlen", str(args.seqlen)]
    windows += [] if args.eval_windows is None else ["--eval_windows", str(args.eval_windows)]
    goes_on = ["--resume"] if folder.exists() else []
    where = ["--output_dir", str(folder), *goes_on]
    subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:], *windows, *where], check=True)


def results(folder: Path) -> Iterator[dict]:
    """The results of a part, as far as they are there: of one run, or of a table."""
    if (folder / RESULT).exists():
        yield json.loads((folder / RESULT).read_text(encoding="utf-8"))
    elif (folder / RESULTS).exists():
        for line in (folder / RESULTS).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["result"]


def speed(decoder: Decoder, plan: Plan, window: torch.Tensor, runs: int) -> float:
    """How many times as fast as the dense model a plan makes a forward pass over a window (1, T): a median."""
    ratios = []
    for _ in range(runs):
        dense = seconds(lambda: decoder.model(input_ids=window, use_cache=False))
        with decoder.under(plan):
            ratios.append(dense / seconds(lambda: decoder.model(input_ids=window, use_cache=False)))
    return statistics.median(ratios)


def losses_by_ffn(decoder: Decoder, plan: Plan, windows: torch.Tensor) -> Iterator[str]:
    """Rows of a table: the mean token loss of windows (N, T), dense and under a plan; and for each FFN that the plan
    removes, without this FFN alone, and under the plan with this FFN put back.
    """
    sweep, dense = Sweep(decoder, windows, Batcher(1)), Plan(decoder.num_layers)
    layers, tokens = plan.ffn_removed, windows.numel()
    alone = sweep.losses(dense, [Trial(layer, Mode(True, False)) for layer in layers])
    back = sweep.losses(plan, [Trial(layer, Mode(plan.mode(layer).attention, True)) for layer in layers])
    yield f"| all | {sweep.loss(dense) / tokens:.3f} | {sweep.loss(plan) / tokens:.3f} |"
    for layer, without, restored in zip(layers, alone, back, strict=True):
        yield f"| {layer} | {without / tokens:.3f} | {restored / tokens:.3f} |"


def rows(found: Sequence[dict], decoder: Decoder, args: argparse.Namespace) -> Iterator[str]:
    """Rows of a table: a line for each stage of each result."""
    window = torch.randint(0, decoder.config.vocab_size, (1, args.seqlen or 256))
    names = labels(args.evaluation)
    for result in found:
        size, ratio = result.get("parameters", {}).get("actual_rate", 0.0), 1.0
        if result["tool"] == "ppllms":
            plan = Plan(result["num_layers"], tuple(result["mha_removed"]), tuple(result["ffn_removed"]))
            ratio = speed(decoder, plan, window, args.runs)
        by_row: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
        for entry in entries([result]):
            if not entry.is_dense:
                error = "" if entry.standard_error is None else f" ± {entry.standard_error:.3g}"
                by_row.setdefault((entry.method, entry.setting), {})[entry.metric, entry.text] = (
                    f"{entry.value:.4g}{error}"
                )
        for (method, setting), values in by_row.items():
            cells = [
                values[metric, text] for text in names for metric in ("kl_divergence", "top1_agreement", "perplexity")
            ]
            told = [method, setting, str(result["seed"]), *cells, f"{1 - size:.0%}", f"{ratio:.2f}"]
            yield "| " + " | ".join(told) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--calibration", nargs="+", required=True, help="texts; the first is that of most parts")
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--nsamples", type=int, default=16, help="calibration of most parts; four times it in `-many`")
    parser.add_argument("--compensate_nsamples", type=int, default=512)
    parser.add_argument("--depth", nargs="+", default=DEPTH, help="methods (default: %(default)s)")
    parser.add_argument("--sparsity", nargs="+", default=SPARSITY, help="methods (default: %(default)s)")
    parser.add_argument("--refit", nargs="+", help="depth methods whose plans are compensated (default: all)")
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--eval_windows", type=int)
    parser.add_argument("--runs", type=int, default=5, help="of each timing")
    parser.add_argument("--parts", nargs="+", help="default: all; the others are told as far as they are there")
    args = parser.parse_args()
    found: dict[str, list[dict]] = {}
    for place, command in commands(args):
        if place.split("/")[0] in (args.parts or [place.split("/")[0]]):
            run(command, args.output / place, args)
        if of_part := [{"method": place, "seed": 0, **result} for result in results(args.output / place)]:
            found[place] = of_part
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "choosing.md").write_text("\n".join(report(found, args)), encoding="utf-8")


def report(found: dict[str, list[dict]], args: argparse.Namespace) -> Iterator[str]:
    """The lines of choosing.md."""
    set_up()
    decoder = Decoder(load_model(ModelSource(args.model)))
    columns = [
        f"{what} {text}"
        for text in labels(args.evaluation).values()
        for what in ("KL", "top-1 agreement", "perplexity")
    ]
    head = ["method", "setting", "seed", *columns, "parameters", "speed"]
    yield from (machine(), "")
    for part, of_part in found.items():
        yield from (f"## {part}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|")
        yield from (*rows(of_part, decoder, args), "")
    tokenizer, text = load_tokenizer(ModelSource(args.model)), args.calibration[0]
    corpus = load_corpus(text, "train", tokenizer)
    windows = calibration_windows(corpus, tokenizer, args.nsamples, args.seqlen or 256, seed=0)
    for result in found.get("depth", []):
        if result["method"] == "ppllms":
            plan = Plan(result["num_layers"], tuple(result["mha_removed"]), tuple(result["ffn_removed"]))
            yield from (f"## FFNs that ppllms removes at {result['parameters']['target_rate']:.0%}", "")
            yield from ("| FFN | without it alone; all: dense | with it back; all: none |", "|---|---|---|")
            yield from (*losses_by_ffn(decoder, plan, windows), "")


if __name__ == "__main__":
    main()
