"""The side of `benchmarks.weight_pruning` that runs in an environment which has llm-compressor."""

import torch

from benchmarks.peers import serve


def prune(model: torch.nn.Module, tokenizer, windows: torch.Tensor, method: str, sparsity: float) -> None:
    """As by default: one window at a time, layer by layer."""
    from llmcompressor import oneshot  # prints, so not before `serve` has turned that away
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"Wanda": WandaPruningModifier, "SparseGPT": SparseGPTModifier}[method]
    rows = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),
        recipe=modifier(sparsity=sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]),
        pipeline="sequential",
        num_calibration_samples=len(windows),
    )


if __name__ == "__main__":
    serve(prune, ("llmcompressor", "torch", "transformers"))
