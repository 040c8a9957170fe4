"""The settings of the two kinds of runs, and which pruners those of ALP mean."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lib.config.gradients import GradientSettings
from lib.config.methods import DENSE, UNIFORM, Method, Pattern
from lib.config.quantization import Quantization
from lib.config.sources import ModelSource, stamp
from lib.sparsity.pruners import Magnitude, Pruner, Ria, Rounded, SparseGpt, Wanda


@dataclass(frozen=True)
class SparsityPruning:
    """The settings of a run of `alp_prune.py`."""

    source: ModelSource
    model_name: str
    method: Method
    pattern: Pattern
    sparsity_ratio: float
    gradients: GradientSettings
    calibration_dataset: str
    dataset: Sequence[str]
    output_dir: Path
    nsamples: int = 128
    seed: int = 0
    alpha: float = 0.15
    owl_m: float = 5.0
    use_variant: bool = False
    a: float = 0.5
    percdamp: float = 0.01
    quantization: Quantization | None = None
    gradient_file: Path | None = None
    seqlen: int | None = None
    batch_size: int | None = None
    overwrite: bool = False
    resume: bool = False
    save_model: Path | None = None
    log: Path | None = None
    eval_stride: int | None = None
    semi_structured: bool = False
    tasks: Sequence[str] = field(default_factory=tuple)

    @property
    def model(self) -> str:
        return self.source.name

    @property
    def texts(self) -> Sequence[str]:
        """The texts of the evaluation."""
        return self.dataset

    @property
    def label(self) -> str:
        """What tells a cell of a grid from the others of its model."""
        seed = f" seed {self.seed}" if self.needs_text else ""
        return f"{self.method.name} {self.target_sparsity:g} {self.pattern}{seed}"

    @property
    def key(self) -> dict:
        """All that the result depends on."""
        pruner, allocator = self.method.pruner, self.method.allocator
        of_pruner = {"ria": {"a": self.a}, "wanda": {"use_variant": self.use_variant}}.get(pruner, {})
        if pruner == "sparsegpt" or self.quantization:
            of_pruner["percdamp"] = self.percdamp
        of_allocator = {"alpha": self.alpha, **({"owl_m": self.owl_m} if allocator == "owl" else {})}
        of_gradients = {
            **asdict(self.gradients),
            "file": stamp(str(self.gradient_file)) if self.gradient_file else None,
        }
        text = {"text": stamp(self.calibration_dataset), "seed": self.seed}
        return {
            **_key_of_source(self.source),
            "tool": "alp_prune",
            "method": self.method.name,
            "sparsity_ratio": self.target_sparsity,
            "sparsity_type": "unstructured" if pruner == DENSE else str(self.pattern),
            **of_pruner,
            **(of_allocator if self.is_allocated else {}),
            **({"gradients": of_gradients} if self.uses_gradients else {}),
            **({"nsamples": self.nsamples} if self.needs_inputs else {}),
            **(text if self.needs_text else {}),
            "quantization": str(self.quantization) if self.quantization else None,
            "semi_structured": self.semi_structured,
            "tasks": [stamp(task) for task in self.tasks],
            **_key_of_evaluation(self.texts, self.seqlen, self.eval_stride),
        }

    @property
    def needs_text(self) -> bool:
        """True when windows of text are drawn by the seed."""
        return self.needs_inputs or self.uses_gradients

    @property
    def target_sparsity(self) -> float:
        """The share of the weights that is to go."""
        return 0.0 if self.method.pruner == DENSE else self.sparsity_ratio

    @property
    def pruner(self) -> Pruner:
        """What prunes, without quantization."""
        return {
            DENSE: Pruner(),
            "magnitude": Magnitude(self.pattern),
            "wanda": Wanda(self.pattern, self.use_variant),
            "ria": Ria(self.pattern, self.a),
            "sparsegpt": SparseGpt(self.pattern, self.percdamp),
        }[self.method.pruner]

    @property
    def rounder(self) -> Pruner | None:
        """What quantizes: SparseGPT while it prunes, from the dense weights; others what was pruned before."""
        if not self.quantization:
            return None
        if self.rounds_while_pruning:
            return SparseGpt(self.pattern, self.percdamp, self.quantization)
        return Rounded(self.quantization, self.percdamp)

    @property
    def rounds_while_pruning(self) -> bool:
        """True when quantizing begins with the dense weights again, and not with the pruned ones."""
        return self.quantization is not None and self.method.pruner == "sparsegpt"

    @property
    def needs_inputs(self) -> bool:
        """True when calibration windows are needed."""
        by_inputs = self.is_allocated and not self.uses_gradients
        return by_inputs or any(pruner.needs_inputs for pruner in (self.pruner, self.rounder) if pruner)

    @property
    def gradient_path(self) -> Path:
        """The file of sensitivities: as given, or where those of this model and these settings are kept."""
        return self.gradient_file or self.gradients.path(self.source.name, self.source.dtype)

    @property
    def is_allocated(self) -> bool:
        """True when layers get sparsities of their own; n:m gives all the same."""
        return self.method.allocator != UNIFORM and not self.pattern.is_structured

    @property
    def uses_gradients(self) -> bool:
        """True when those sparsities are ALP's, from connection sensitivity."""
        return self.is_allocated and self.method.allocator == "alp"


def _key_of_source(source: ModelSource) -> dict:
    return {"model": stamp(source.name), "dtype": source.dtype}


def _key_of_evaluation(texts: Sequence[str], seqlen: int | None, stride: int | None) -> dict:
    return {"eval": [stamp(text) for text in texts], "seqlen": seqlen, "eval_stride": stride}
