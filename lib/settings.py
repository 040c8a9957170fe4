"""The settings of the two kinds of runs, and which pruners those of ALP mean."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib.methods import DENSE, UNIFORM, GradientSettings, Method, Pattern, Quantization
from lib.names import ModelSource
from lib.plan import SavedPlan
from lib.pruners import Magnitude, Pruner, Ria, Rounded, SparseGpt, Wanda


@dataclass(frozen=True)
class DepthPruning:
    """The settings of a run; the flags of `ppllms.py` have the same names and meanings.

    With a `saved_plan` nothing is searched, and the settings of the search and its text have no meaning.
    """

    source: ModelSource
    dataset: str
    eval_datasets: list[str]
    output_dir: Path
    saved_plan: SavedPlan | None = None
    method: str = "ppllms"
    num_blocks: int | None = None
    prune_rate: float = 0.25
    mha_remove_layers: int | None = None
    ffn_remove_layers: int | None = None
    mha_ffn_ratio: float | str = 2.0
    nsamples: int = 128
    bi_windows: int | None = None
    eval_ppl: bool = True
    seed: int = 0
    seqlen: int | None = None
    batch_size: int | None = None
    overwrite: bool = False
    save_model: Path | None = None
    save_format: str = "hf"

    @property
    def model_name(self) -> str:
        return self.source.name

    @property
    def needs_windows(self) -> bool:
        """True when calibration text is needed."""
        return self.saved_plan is None and self.method != "random"


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
    save_model: Path | None = None
    log: Path | None = None
    semi_structured: bool = False
    tasks: Sequence[str] = field(default_factory=tuple)

    @property
    def model(self) -> str:
        return self.source.name

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
        if self.method.pruner == "sparsegpt":
            return SparseGpt(self.pattern, self.percdamp, self.quantization)
        return Rounded(self.quantization, self.percdamp)

    @property
    def needs_inputs(self) -> bool:
        """True when calibration text is needed."""
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
