"""Weight pruning of a mixture of experts, compared with dense models.

    python -m benchmarks.experts                # 2 layers of 512, 64 experts of 256, of which 8 are picked

Three models take turns: the mixture; a dense one whose FFN has as many weights as a token meets in the mixture's
(`active`); a dense one whose FFN has as many as are stored. Times include set-up, but not loading. Memory is beyond the
model's weights.
"""

import argparse

import torch
import transformers

from benchmarks.common import VOCABULARY, add_shape_flags, device, machine, random_llama, spread
from benchmarks.weight_pruning import PRUNERS, Engine
from lib.runtime.memory import keep_freed_memory


def random_mixture(args: argparse.Namespace) -> torch.nn.Module:
    """A Qwen3 MoE with random weights, on the accelerator if there is one."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        moe_intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.hidden // args.heads,
        num_experts=args.experts,
        num_experts_per_tok=args.picked,
        max_position_embeddings=args.seqlen,
    )
    with torch.device(device()):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_flags(
        parser, layers=2, hidden=512, ffn=256, heads=8, experts=64, picked=8, windows=16, seqlen=512, runs=3
    )
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--methods", nargs="+", choices=PRUNERS, default=["Wanda", "SparseGPT"])
    args = parser.parse_args()
    keep_freed_memory()  # as our runs do
    windows = torch.randint(0, VOCABULARY, (args.windows, args.seqlen))
    engines = {"mixture": Engine(random_mixture(args), windows, None)}
    for name, experts in (("dense, active", args.picked), ("dense, stored", args.experts)):
        model = random_llama(args.layers, args.hidden, experts * args.ffn, context=args.seqlen, heads=args.heads)
        engines[name] = Engine(model, windows, None)
    print(machine())
    print(
        f"{args.layers} layers of {args.hidden}, {args.experts} experts of {args.ffn} with {args.picked} picked, ",
        end="",
    )
    print(f"{args.windows} x {args.seqlen} tokens, sparsity {args.sparsity}, {args.runs} runs")
    for method in args.methods:
        times: dict[str, list[float]] = {name: [] for name in engines}
        memory = dict.fromkeys(engines, 0.0)
        for number in range(args.runs + 1):
            for name, engine in engines.items():
                taken, most = engine.prune(PRUNERS[method], args.sparsity, {})
                if number:  # the first round is a warm-up
                    times[name].append(taken)
                    memory[name] = max(memory[name], most)
        print(f"{method}:")
        for name, values in times.items():
            ratios = [own / other for own, other in zip(times["mixture"], values, strict=True)]
            ratio = "" if name == "mixture" else f"; the mixture takes {spread(ratios)} times as long"
            print(f"  {name:14} {spread(values, ' s')}, {memory[name]:,.0f} MiB{ratio}", flush=True)


if __name__ == "__main__":
    main()
