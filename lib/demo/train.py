"""Trains the bundled demo model, a 12-layer Llama of 4 million parameters, on documentation found on this machine.

    python -m lib.demo.train --output lib/demo/model --compile      # about 75 minutes on two CPU cores

Text: the train split of the standard library's documentation (`lib/demo/text.py`), and the docstrings of the Python
packages installed beside this tool. Paragraphs that occur in the held-out split are left out. At the end the held-out
perplexity is printed beside that of a unigram model. Dimensions follow real Llamas: the FFN of a layer has twice the
parameters of its attention.
"""

import argparse
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.demo.text import documents, module_document

PACKAGES = (
    "torch transformers datasets accelerate numpy pyarrow pandas huggingface_hub sympy networkx fsspec tokenizers "
    "httpx rich pip setuptools matplotlib PIL jinja2 click safetensors requests yaml"
).split()
END = "<|endoftext|>"
CONTEXT = 256


def package_documents() -> list[str]:
    """The docstrings of the installed packages: one document per folder, without repeated or held-out paragraphs."""
    seen = {paragraph for text in documents("held_out") for paragraph in text.split("\n\n")}
    root, texts = Path(sysconfig.get_path("purelib")), []
    folders = {path.parent for name in PACKAGES for path in (root / name).rglob("*.py") if "tests" not in path.parts}
    for folder in sorted(folders):
        kept = []
        for paragraph in module_document(sorted(folder.glob("*.py"))).split("\n\n"):
            if paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        texts.append("\n\n".join(kept))
    return [text for text in texts if len(text) > 200]


def without_held_out(texts: list[str]) -> list[str]:
    """The documents without the paragraphs that also occur in the held-out split."""
    held_out = {paragraph for text in documents("held_out") for paragraph in text.split("\n\n")}
    return ["\n\n".join(p for p in text.split("\n\n") if p not in held_out) for text in texts]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Its one special token both begins and ends a text, and is never added automatically."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one row of token ids, each followed by the end-of-text token."""
    encoded = tokenizer([text + END for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


def make_model(vocab_size: int, end_id: int) -> LlamaForCausalLM:
    """The untrained demo model. Residual outputs start small, as in GPT-2, so that twelve layers train stably."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=12,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine decay to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def sample_windows(stream: torch.Tensor, count: int) -> torch.Tensor:
    """Windows (count, CONTEXT + 1) of the stream at random starts."""
    starts = torch.randint(0, len(stream) - CONTEXT - 1, (count, 1))
    return stream[starts + torch.arange(CONTEXT + 1)]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean cross-entropy per token, in nats, over the held-out stream cut into windows."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in windows.split(16)]
    return sum(losses) / len(windows)


def unigram_perplexity(train: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """Perplexity of the held-out stream under the token frequencies of the training stream (add-one smoothing)."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    return math.exp(-(counts / counts.sum()).log()[held_out].mean().item())


def train(model: LlamaForCausalLM, streams: list[torch.Tensor], held_out: torch.Tensor, args: argparse.Namespace):
    """Trains with AdamW for `args.steps` batches, each drawn in equal parts from the streams."""
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    rest = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    step_model = torch.compile(model) if args.compile else model
    start = time.time()
    for step in range(args.steps):
        batch = torch.cat([sample_windows(stream, args.batch_size // len(streams)) for stream in streams])
        logits = step_model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            perplexity = math.exp(held_out_loss(model, held_out))
            seconds = time.time() - start
            print(f"step {step + 1} loss {loss.item():.3f} held-out ppl {perplexity:.2f} {seconds:.0f} s", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch_size", type=int, default=16, help="windows of 256 tokens in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--threads", type=int, help="CPU threads for torch")
    parser.add_argument("--compile", action="store_true", help="compile the model: faster after a minute, needs gcc")
    parser.add_argument("--report_every", type=int, default=100, help="steps between held-out evaluations")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    texts, packages = without_held_out(documents("train")), package_documents()
    random.Random(0).shuffle(packages)
    tokenizer = train_tokenizer(texts + packages, args.vocab_size)
    own, foreign, held_out = (token_stream(tokenizer, group) for group in (texts, packages, documents("held_out")))
    print(f"tokens: standard library {len(own)}, packages {len(foreign)}, held out {len(held_out)}", flush=True)
    print(f"unigram ppl {unigram_perplexity(own, held_out, args.vocab_size):.1f}", flush=True)
    model = make_model(args.vocab_size, tokenizer.eos_token_id)
    try:
        train(model, [own, foreign], held_out, args)
    except KeyboardInterrupt:
        print("stopped: the model is saved as it is")
    model.bfloat16().save_pretrained(args.output)
    model.config.dtype = torch.float32  # stored in half the bytes, loaded as fp32 for CPUs
    model.config.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
