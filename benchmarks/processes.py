"""Depth pruning in one process and in two, each with one thread: seconds of ranking, search and evaluation.

    python -m benchmarks.processes [--runs 5]

The model is a random Llama, the text synthetic. The times are those that `ppllms.py` reports. All runs must choose the
same layers.
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

PARTS = ("bi", "search", "evaluate")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--windows", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", layers=16, hidden=256)
        text = folder / "text.txt"
        text.write_text(" ".join(f"word {i * i % 997} of {i}" for i in range(60 * args.windows)))
        found = {count: [] for count in (1, 2)}
        for number in range(args.runs):
            for count in found:
                found[count].append(run(folder, text, args.windows, count, number))
    assert len({str(result["rounds"]) for results in found.values() for result in results}) == 1
    print("16-layer random Llama, hidden 256, 6 candidates, 3 rounds, the same losses to the bit; fp32, a thread each")
    for part in PARTS:
        ratios = [one["seconds"][part] / two["seconds"][part] for one, two in zip(found[1], found[2], strict=True)]
        median = statistics.median(one["seconds"][part] for one in found[1])
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        ratio = statistics.median(ratios)
        print(f"{part:<10} {median:6.2f} s in one process, two are {ratio:.2f} times as fast ({spread})")


def run(folder: Path, text: Path, windows: int, processes: int, number: int) -> dict:
    """Runs `ppllms.py` once; returns its result.json."""
    output = folder / f"run-{processes}-{number}"
    launcher = [*LAUNCHER, str(processes)] if processes > 1 else []
    flags = ["--model_name", folder / "model", "--dataset", text, "--eval_datasets", text, "--nsamples", windows]
    flags += ["--seqlen", 128, "--batch_size", 2, "--mha_remove_layers", 3, "--ffn_remove_layers", 6]
    command = [sys.executable, *launcher, ROOT / "ppllms.py", *flags, "--output_dir", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    return json.loads((output / "result.json").read_text())


if __name__ == "__main__":
    main()
