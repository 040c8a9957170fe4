"""Compensation compared with the published closed forms: the same plan, other text, paired windows.

    python ppllms.py --output_dir RUN && python -m benchmarks.compensation RUN/result.json
    python -m benchmarks.compensation RUN/result.json --dataset c4 --eval_datasets c4 wikitext2 --seqlen 512

`magnitude`  Prune&Comp (arXiv:2507.18212): hidden states after a gap are scaled by one number, the ratio of the mean
             norms of the dense model's hidden states after and before the gap. In a pre-norm model this is the same as
             the paper's scaling of the weights below.
`map`        ReplaceMe (arXiv:2505.02819): a map (D, D) of what the sublayer before a gap writes, by least squares on
             the dense model's hidden states, folded into the sublayer's output projection.
`nearest`, `all`  `ppllms.py --compensate`.

Each side starts from the model of the plan. Prints perplexity and the KL divergence from the dense model, in nats a
token, and the paired differences to `all`, with standard errors over windows.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import machine
from lib.config.plan import Plan, read_plan
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import calibration_windows, evaluation_windows
from lib.depth.compensation import Streams, compensate, steps_of
from lib.depth.refit import ridge
from lib.engine.finite import final_hidden_states
from lib.engine.tail import token_losses
from lib.models.decoder import Decoder
from lib.models.loading import load_model, load_tokenizer
from lib.models.residual_writers import find_writer, sublayer_of
from lib.models.weight_deltas import Changes
from lib.runtime.batching import Batcher
from lib.runtime.setup import quiet_libraries

_LEAST_SQUARES = 1e-6  # the strength of a ridge that only keeps the system solvable
Side = Callable[[Decoder, Plan, torch.Tensor, Batcher], None]


@torch.no_grad()
def magnitude(decoder: Decoder, plan: Plan, windows: torch.Tensor, batcher: Batcher) -> None:
    """Scales the hidden states after each gap, by a hook on the layer that reads them."""
    first, steps = steps_of(decoder, plan)
    streams = Streams(decoder, windows, batcher, first)
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        streams.pruned = streams.dense.fork()
        streams.walk({step: None}, lambda step, writer: None)
        if step.is_gap and after:
            mean_norms = [one.hidden_states.float().norm(dim=-1).mean() for one in (streams.dense, streams.pruned)]
            scale = (mean_norms[0] / mean_norms[1]).item()
            decoder.layers[after.layer].register_forward_pre_hook(
                lambda layer, args, scale=scale: (args[0] * scale, *args[1:])
            )


@torch.no_grad()
def least_squares_map(decoder: Decoder, plan: Plan, windows: torch.Tensor, batcher: Batcher) -> None:
    """Folds a map into the projection before each gap; all maps are found on the dense model's hidden states."""
    first, steps = steps_of(decoder, plan)
    streams = Streams(decoder, windows, batcher, first)
    for step in steps:
        streams.pruned = streams.dense.fork()
        writer = find_writer(decoder, step.layer, sublayer_of(step.pruned[1])) if step.is_gap else None

        def fold(step, writer) -> None:
            to_fit, to_check = streams.observe(step, writer)
            gram, cross = to_fit.gram + to_check.gram, to_fit.cross + to_check.cross
            weight = writer.matrix.float()
            writer.matrix.add_(weight @ ridge(weight.T @ gram @ weight, weight.T @ cross, _LEAST_SQUARES))

        streams.walk({step: writer}, fold)


def ours(mode: str, decoder: Decoder, plan: Plan, windows: torch.Tensor, batcher: Batcher) -> None:
    with tempfile.TemporaryDirectory() as folder:
        compensate(decoder, plan, windows, mode, batcher, Changes(Path(folder)))


SIDES: dict[str, Side] = {
    "pruned": lambda *args: None,
    "magnitude": magnitude,
    "map": least_squares_map,
    "nearest": partial(ours, "nearest"),
    "all": partial(ours, "all"),
}


@torch.no_grad()
def compare(decoder: Decoder, plan: Plan, dense: Decoder, windows: torch.Tensor) -> torch.Tensor:
    """The mean loss and the mean KL divergence from the dense model, of each window (N, T): (N, 2), in nats a token."""
    found = []
    for window in windows.split(1):
        logits = [
            one.logits(final_hidden_states(one, window, modes))[0].float()
            for one, modes in ((decoder, plan.modes), (dense, dense.given_modes))
        ]
        own, their = (one.log_softmax(dim=-1) for one in logits)
        divergence = (their.exp() * (their - own)).sum(dim=-1).mean()
        loss = token_losses(logits[0][:-1], window[0, 1:].to(own.device)).mean()
        found.append(torch.stack([loss, divergence]))
    return torch.stack(found).double().cpu()


def with_error(values: torch.Tensor) -> str:
    """`mean ± standard error` of values (N,)."""
    return f"{values.mean():+.4f} ± {values.std() / len(values) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="result.json of a run of ppllms.py")
    parser.add_argument("--dataset", default="demo", help="calibration text, named as for ppllms.py")
    parser.add_argument("--eval_datasets", nargs="+", default=["demo"], help="evaluation texts")
    for flag, default in (
        ("nsamples", 512),
        ("seqlen", 256),
        ("windows", 256),
        ("eval_windows", 64),
        ("batch_size", 8),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    quiet_libraries()
    saved = read_plan(args.plan)
    source = ModelSource(saved.model)
    tokenizer = load_tokenizer(source)
    corpus = load_corpus(args.dataset, "train", tokenizer)
    calibration = calibration_windows(corpus, tokenizer, args.nsamples, args.seqlen, seed=0)[: args.windows]
    texts = {
        text: evaluation_windows(load_corpus(text, "test", tokenizer), tokenizer, args.seqlen)[: args.eval_windows]
        for text in args.eval_datasets
    }
    print(f"{machine()}; {calibration.numel():,} calibration tokens of {args.dataset}")
    dense = Decoder(load_model(source))
    found: dict[str, dict[str, torch.Tensor]] = {}
    for side, apply in SIDES.items():
        decoder, start = Decoder(load_model(source)), time.perf_counter()
        apply(decoder, saved.plan, calibration, Batcher(args.batch_size))
        taken = time.perf_counter() - start
        found[side] = {text: compare(decoder, saved.plan, dense, windows) for text, windows in texts.items()}
        print(f"{side:9} {taken:6.1f} s", end="")
        for text, values in found[side].items():
            print(f"  {text}: {values[:, 0].mean().exp():.2f}, KL {values[:, 1].mean():.4f}", end="")
        print(flush=True)
    for text in texts:
        print(f"{text}: loss and KL less those of all, paired over {len(texts[text])} windows")
        for side in SIDES:
            differences = found[side][text] - found["all"][text]
            print(f"  {side:9} {with_error(differences[:, 0])}  {with_error(differences[:, 1])}")


if __name__ == "__main__":
    main()
