"""Wanda and SparseGPT beside llm-compressor: the same model, windows and sparsity, in turn, on one machine.

    python -m venv PEER && PEER/bin/pip install llmcompressor
    python -m benchmarks.peers PEER/bin/python

llm-compressor needs library versions of its own, so it runs in a process of its own environment, which waits while we
work, as we wait while it works. Both work as by default: it on one window at a time. Times are without loading, with
the set-up of both; memory is the most that a process held beyond what it held before.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import add_shape_flags, machine, peak_memory, random_llama, seconds, spread
from lib.batching import Batcher, automatic_batch_size, keep_freed_memory
from lib.linears import find_linears, input_groups
from lib.loading import load_tokenizer
from lib.model import Decoder
from lib.names import ModelSource
from lib.prune import prune_layers
from lib.pruners import SparseGpt, Wanda

PRUNERS = {"Wanda": Wanda(), "SparseGPT": SparseGpt()}
PEER = Path(__file__).with_name("peer_llm_compressor.py")


class Peer:
    """The other process, which prunes when it is told to."""

    def __init__(self, python: str, folder: Path):
        command = [python, str(PEER), str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.versions = self._process.stdout.readline().strip()

    def prune(self, method: str, sparsity: float) -> tuple[float, float]:
        """Seconds, and MiB, of one run; its masks are in the folder then."""
        print(method, sparsity, file=self._process.stdin, flush=True)
        taken, memory = self._process.stdout.readline().split()
        return float(taken), float(memory)

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of the environment that has llmcompressor")
    add_shape_flags(parser, layers=8, hidden=512, ffn=1376, windows=32, seqlen=512, runs=3)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    keep_freed_memory()  # as in a run of ours; the other process is as its users have it
    model = random_llama(args.layers, args.hidden, args.ffn, context=args.seqlen, dtype=getattr(torch, args.dtype))
    windows = torch.randint(0, 2048, (args.windows, args.seqlen))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        load_tokenizer(ModelSource("demo")).save_pretrained(Path(folder) / "model")  # they want one, and do not use it
        save_file({"windows": windows}, Path(folder) / "windows.safetensors")
        peer = Peer(args.python, Path(folder))
        print(machine())
        print(
            f"{args.layers} layers of {args.hidden}/{args.ffn}, {args.dtype}, {args.windows} x {args.seqlen} tokens, ",
            end="",
        )
        print(f"sparsity {args.sparsity}, {args.runs} runs after one that is not counted")
        for method in PRUNERS:
            compare(method, model, windows, peer, Path(folder), args)
        peer.end()


def compare(
    method: str, model: torch.nn.Module, windows: torch.Tensor, peer: Peer, folder: Path, args: argparse.Namespace
) -> None:
    """Prunes on both sides in turn, and prints times, memory and how far the masks agree."""
    linears = {
        f"{i}.{n}": linear for i, layer in enumerate(find_linears(Decoder(model))) for n, linear in layer.items()
    }
    dense = {name: linear.weight.clone() for name, linear in linears.items()}

    def prune() -> None:
        decoder = Decoder(model)
        sparsities = [args.sparsity] * decoder.num_layers
        batch_size = automatic_batch_size(decoder.device, args.seqlen, decoder.token_bytes)
        prune_layers(decoder, input_groups(decoder), PRUNERS[method], sparsities, windows, Batcher(batch_size))

    def restore() -> None:
        for name, linear in linears.items():
            linear.weight.copy_(dense[name])

    times, theirs, memory, their_memory = [], [], 0.0, 0.0
    for _ in range(args.runs + 1):
        taken, their_memory = peer.prune(method, args.sparsity)
        theirs.append(taken)
        restore()
        times.append(seconds(prune))
    found = {name: linear.weight == 0 for name, linear in linears.items()}
    restore()
    memory = peak_memory(prune)
    restore()
    masks = load_file(folder / "masks.safetensors")
    equal = sum(int((found[name] == masks[name].bool()).sum()) for name in found) / sum(
        m.numel() for m in found.values()
    )
    ratios = [other / own for other, own in zip(theirs[1:], times[1:], strict=True)]
    print(f"{method}\n  {peer.versions}: {spread(theirs[1:], ' s')}, {their_memory:.0f} MiB")
    print(f"  ours: {spread(times[1:], ' s')}, {memory:.0f} MiB")
    print(f"  theirs / ours: {spread(ratios)}; equal mask bits: {equal:.4%}", flush=True)


if __name__ == "__main__":
    main()
