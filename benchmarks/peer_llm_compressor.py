"""A peer of `benchmarks.weight_pruning`: llm-compressor, in an environment of its own."""

import torch

from benchmarks.peers import serve


def prune(model: torch.nn.Module, tokenizer, windows: torch.Tensor, method: str, sparsity: float) -> None:
    """Prunes with the defaults: one window at a time, layer by layer."""
    from llmcompressor import oneshot  # prints on import, so only after `serve` has redirected stdout
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
