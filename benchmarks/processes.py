"""Depth pruning and weight pruning in one process and in two, each with one thread: seconds of the parts.

    python -m benchmarks.processes [--runs 5]
    python -m benchmarks.processes --commands wanda sparsegpt --layers 6 --hidden 768 --windows 16

The model is a random Llama, the text synthetic. The times are those that the scripts report: of ranking, search and
evaluation, and of pruning, whose `select` is the pruner itself. All runs of depth pruning must choose the same layers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.offload import ROOT, make_model

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
DEPTH = ["ppllms.py", "--mha_remove_layers", 3, "--ffn_remove_layers", 6]
SPARSITY = ["alp_prune.py", "--sparsity_ratio", 0.5, "--prune_method"]
COMMANDS = {"depth": DEPTH, "wanda": [*SPARSITY, "wanda"], "sparsegpt": [*SPARSITY, "sparsegpt"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", layers=args.layers, hidden=args.hidden)
        text = folder / "text.txt"
        text.write_text(" ".join(f"word {i * i % 997} of {i}" for i in range(60 * args.windows)))
        print(f"{args.layers}-layer random Llama, hidden {args.hidden}, {args.windows} windows, fp32, a thread each")
        for command in args.commands:
            compare(command, folder, args)


def compare(command: str, folder: Path, args: argparse.Namespace) -> None:
    """Runs a command in one process and in two, in turn, and prints the seconds of its parts."""
    found = {count: [] for count in (1, 2)}
    for number in range(args.runs):
        for count in found:
            found[count].append(run(command, folder, args.windows, count, number))
    assert len({str(result.get("rounds")) for results in found.values() for result in results}) == 1
    for part in seconds_of(found[1][0]):
        of_one, of_two = ([seconds_of(result)[part] for result in results] for results in found.values())
        ratios = [one / two for one, two in zip(of_one, of_two, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"{command + ' ' + part:<20} {statistics.median(of_one):6.2f} s in one process, "
            f"two are {statistics.median(ratios):.2f} times as fast ({spread})"
        )


def seconds_of(result: dict) -> dict[str, float]:
    """The seconds of the parts that processes share."""
    if "prune_seconds" in result:
        return result["prune_seconds"]["pruned"]
    return {part: result["seconds"][part] for part in ("bi", "search", "evaluate")}


def run(command: str, folder: Path, windows: int, processes: int, number: int) -> dict:
    """Runs a command once; returns its result.json."""
    output = folder / f"{command}-{processes}-{number}"
    launcher = [*LAUNCHER, str(processes)] if processes > 1 else []
    script, *flags = COMMANDS[command]
    flags += ["--model", folder / "model", "--calibration_dataset", folder / "text.txt", "--nsamples", windows]
    flags += ["--eval_datasets", folder / "text.txt", "--seqlen", 128, "--batch_size", 2]
    line = [sys.executable, *launcher, ROOT / script, *flags, "--output_dir", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, line)), env=environment, check=True, capture_output=True)
    return json.loads((output / "result.json").read_text())


if __name__ == "__main__":
    main()
