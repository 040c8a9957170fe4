"""The console output of an `alp_prune.py` run."""

from collections.abc import Mapping, Sequence

from lib.config.gradients import GradientSettings
from lib.config.sparsity import SparsityPruning
from lib.evaluation.distance import Evaluation
from lib.models.decoder import Decoder
from lib.models.limits import dtype_name
from lib.reporting.console import Report, columns
from lib.sensitivity import compute


def show_model(
    report: Report,
    settings: SparsityPruning,
    gradients: GradientSettings,
    decoder: Decoder,
    weights: int,
    seqlen: int,
) -> None:
    """Prints the model, with `weights` weights that can be pruned, and what will be done to it."""
    name = f"{decoder.family}, {dtype_name(decoder.model)}, {decoder.device}"
    report.print(f"Model       {settings.model} ({name})")
    report.print(
        f"Parameters  {decoder.total_parameters:,}, of them {weights:,} in the matrices of {decoder.num_layers} layers"
    )
    report.print(f"Method      {describe_method(settings)}")
    if settings.needs_inputs:
        windows = f"{settings.nsamples} windows of {seqlen} tokens, seed {settings.seed}"
        report.print(f"Calibration {settings.calibration_dataset}: {windows}")
    if settings.uses_gradients:
        report.print(f"Gradients   {compute.describe(gradients)}")
    elif not settings.method.is_uniform and not settings.is_allocated:
        allocator = settings.method.allocator
        report.print(f"            {settings.pattern} sets the sparsity of every layer, so {allocator} is not used")


def show_kernel(report: Report, kernel: object, reason: str) -> None:
    """How SparseGPT's columns are updated on a GPU."""
    report.print(f"Kernel      {'of Triton' if kernel else f'none of Triton, so it is slower: {reason}'}")


def describe_method(settings: SparsityPruning) -> str:
    allocator, how = settings.method.allocation, "the same in every layer"
    if not settings.method.pruning.prunes:
        what = f"{settings.method.name}: nothing is pruned"
    else:
        if allocator and settings.is_allocated:
            how = f"{allocator.name} densities, alpha {settings.alpha:g}{allocator.summary.format(settings)}"
        variant = " (variant)" if settings.use_variant else ""
        what = f"{settings.method.pruner}{variant}, {settings.sparsity_ratio:g} {settings.pattern}, {how}"
    return what + (f"; then {settings.quantization}" if settings.quantization else "")


def show_densities(report: Report, scores: Sequence[float] | None, densities: Sequence[float]) -> None:
    if scores is None:
        return
    report.print()
    report.print("Importance and density by layer")
    cells = [
        f"{layer}: {score:.4f} {density:.3f}"
        for layer, (score, density) in enumerate(zip(scores, densities, strict=True))
    ]
    for row in columns(cells, 4):
        report.print("  " + row)


def show_result(report: Report, result: dict, evaluations: Mapping[str, Mapping[str, Evaluation]]) -> None:
    report.print()
    report.print("Sparsity measured by layer")
    for row in columns([f"{layer}: {found:.4f}" for layer, found in enumerate(result["layer_sparsity"])], 6):
        report.print("  " + row)
    report.print(f"  all: {result['sparsity']:.4f}")
    report.print()
    stages = " -> ".join(next(iter(evaluations.values())))
    report.print(f"Perplexity ({stages}), and distance to the dense model; ± standard error over windows")
    for text, found in evaluations.items():
        report.print(f"  {text}: {' -> '.join(str(one.perplexity) for one in found.values())}")
        for stage, one in found.items():
            if one.distance:
                report.print(f"    {stage + ': ' if len(found) > 2 else ''}{one.distance}")


def show_speed(report: Report, speed: dict[str, float], tokens: int, library: str) -> None:
    """Tokens per second of the dense model and of 2:4 kernels of a library, on windows of so many tokens."""
    dense, sparse = speed["dense"], speed["semi_structured"]
    report.print()
    report.print(f"Speed of the layers on windows of {tokens} tokens")
    report.print(
        f"  dense {dense:,.0f} tokens/s, in 2:4 kernels of {library} {sparse:,.0f}: {sparse / dense:.2f} times"
    )
