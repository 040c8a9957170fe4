"""How much of the lost perplexity a short LoRA training recovers after pruning. Requires peft.

    python ppllms.py --save_model OUT && python -m benchmarks.healing OUT
    python -m benchmarks.healing llama-2-7b-pruned --dataset c4 --eval_dataset wikitext2 --seqlen 2048 --batch_size 4

The folder holds a pruned model saved by `ppllms.py --save_model` (format hf), used like any transformers model. peft
adds adapters of rank 16 to all its linears; AdamW trains only these, on the calibration text. Perplexity is measured
on the evaluation text, as in `ppllms.py`.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.common import machine
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import calibration_windows, evaluation_windows
from lib.engine.tail import token_losses
from lib.evaluation.perplexity import perplexity
from lib.models.loading import load_model, load_tokenizer
from lib.runtime.batching import Batcher
from lib.runtime.setup import quiet_libraries


def perplexity_of(model: torch.nn.Module, windows: torch.Tensor) -> float:
    @torch.no_grad()
    def window_losses(input_ids: torch.Tensor, scored: int) -> torch.Tensor:
        def batch_losses(rows: slice) -> torch.Tensor:
            ids = input_ids[rows].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            return token_losses(logits[:, :-1], ids[:, 1:])[:, -scored:].mean(dim=1)

        return Batcher(4).map(batch_losses, len(input_ids))

    model.eval()
    return perplexity(window_losses, windows).value


def train(model: torch.nn.Module, windows: torch.Tensor, args: argparse.Namespace) -> None:
    """Trains the parameters that require gradients on random windows (N, T), with cosine decay of the learning rate."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(args.steps):
        rows = torch.randint(len(windows), (args.batch_size,), generator=generator)
        batch = windows[rows].to(model.device)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pruned model")
    parser.add_argument("--dataset", default="demo", help="text to train on, named as for ppllms.py")
    parser.add_argument("--eval_dataset", default="demo", help="text to measure perplexity on")
    for flag, default in (("steps", 300), ("batch_size", 8), ("seqlen", 256), ("rank", 16), ("nsamples", 10_000)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save", type=Path, help="folder for the adapters")
    args = parser.parse_args()
    quiet_libraries()
    torch.manual_seed(0)
    print(machine())
    tokenizer = load_tokenizer(ModelSource(args.model))
    windows = calibration_windows(
        load_corpus(args.dataset, "train", tokenizer), tokenizer, args.nsamples, args.seqlen, seed=0
    )
    held_out = evaluation_windows(load_corpus(args.eval_dataset, "test", tokenizer), tokenizer, args.seqlen)
    pruned = load_model(ModelSource(args.model))
    print(f"pruned: {pruned.num_parameters():,} parameters, perplexity {perplexity_of(pruned, held_out):.2f}")
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(pruned, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    start = time.perf_counter()
    train(model, windows, args)
    tokens = args.steps * args.batch_size * args.seqlen
    print(f"LoRA:   {trained:,} parameters trained on {tokens:,} tokens in {time.perf_counter() - start:.0f} s")
    print(f"healed: perplexity {perplexity_of(model, held_out):.2f}")
    if args.save:
        model.save_pretrained(args.save)


if __name__ == "__main__":
    main()
