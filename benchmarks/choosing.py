"""Which method, how much of it, and calibrated on what, on one model.

    python -m benchmarks.choosing demo OUT --calibration demo --evaluation demo
    python -m benchmarks.choosing MODEL OUT --calibration c4 wikitext2 --evaluation c4 wikitext2 --seqlen 512

Every part is a grid of one of the two scripts, in a folder of its own below OUT: a finished cell is not run again, so
the same command goes on where it was stopped. OUT/choosing.md has all cells with their distance to the dense model,
perplexities, size and speed. Speed is that of the layers on a window, each pruned model in turn with the dense one.
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
from lib.config.plan import Plan
from lib.config.sources import ModelSource, labels
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from lib.reporting.entries import entries
from lib.runtime.setup import set_up
from lib.storage.output_folder import RESULT, RESULTS

ROOT = Path(__file__).resolve().parents[1]
RATES, SPARSITIES = ["0.1", "0.2", "0.25"], ["0.5", "0.6", "0.7"]
DEPTH = ["ppllms", "shortgpt", "sleb", "blockpruner"]
SPARSITY = ["magnitude", "wanda", "ria", "sparsegpt", "admm", "wanda_alp", "sparsegpt_alp", "admm_alp", "admm_atp"]


def parts(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each part: a script of the project and its flags."""
    first, everything = args.calibration[:1], args.calibration
    depth = ["ppllms.py", "--model_name", args.model, "--eval_datasets", *args.evaluation]
    sparsity = ["alp_prune.py", "--model", args.model, "--dataset", *args.evaluation]
    few, many = ["--nsamples", str(args.nsamples)], ["--nsamples", str(8 * args.nsamples)]
    compensated = ["--compensate", "all", "--compensate_dataset", *everything]
    at_20, at_60 = (
        ["--prune_rate", "0.2", "--method", "ppllms"],
        ["--sparsity_ratio", "0.6", "--prune_method", "sparsegpt"],
    )
    found = {
        "depth": [*depth, "--dataset", *first, *few, "--prune_rate", *RATES, "--method", *DEPTH, *compensated],
        "sparsity": [
            *(*sparsity, "--calibration_dataset", *first, *few, "--prune_method", *SPARSITY),
            *("--sparsity_type", "unstructured", "2:4", "--sparsity_ratio", *SPARSITIES),
        ],
        "depth-many": [*depth, "--dataset", *first, *many, *at_20, *compensated],
        "sparsity-many": [*sparsity, "--calibration_dataset", *first, *many, *at_60],
        "depth-seeds": [*depth, "--dataset", *first, *few, *at_20, *compensated, "--seed", "0", "1", "2"],
        "sparsity-seeds": [*sparsity, "--calibration_dataset", *first, *few, *at_60, "--seed", "0", "1", "2"],
        "depth-self": [*depth, "--dataset", "self", *few, *at_20, "--compensate", "all"],
        "sparsity-self": [*sparsity, "--calibration_dataset", "self", *few, *at_60],
    }
    if len(everything) > 1:
        found["depth-mixed"] = [*depth, "--dataset", *everything, *few, *at_20, "--compensate", "all"]
        found["sparsity-mixed"] = [*sparsity, "--calibration_dataset", *everything, *few, *at_60]
    return found


def run(command: Sequence[str], folder: Path, args: argparse.Namespace) -> None:
    """Runs one part; what is finished in its folder stays."""
    windows = [] if args.seqlen is None else ["--seqlen", str(args.seqlen)]
    windows += [] if args.eval_windows is None else ["--eval_windows", str(args.eval_windows)]
    goes_on = ["--resume"] if folder.exists() else []
    where = ["--output_dir", str(folder), *goes_on]
    subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:], *windows, *where], check=True)


def results(folder: Path) -> Iterator[dict]:
    """The results of a part: of one run, or of a grid."""
    if (folder / RESULT).exists():
        yield json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return
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
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int)
    parser.add_argument("--eval_windows", type=int)
    parser.add_argument("--runs", type=int, default=5, help="of each timing")
    parser.add_argument("--parts", nargs="+", help="default: all")
    args = parser.parse_args()
    chosen = {name: command for name, command in parts(args).items() if name in (args.parts or name)}
    for name, command in chosen.items():
        run(command, args.output / name, args)
    set_up()
    decoder = Decoder(load_model(ModelSource(args.model)))
    columns = [
        f"{what} {text}"
        for text in labels(args.evaluation).values()
        for what in ("KL", "top-1 agreement", "perplexity")
    ]
    head = ["method", "setting", "seed", *columns, "parameters", "speed"]
    lines = [machine(), ""]
    for name in chosen:
        lines += [f"## {name}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += [*rows(list(results(args.output / name)), decoder, args), ""]
    (args.output / "choosing.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
