"""The settings of a run of `alp_prune.py`. Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from lib.config.gradients import GradientSettings
from lib.config.keys import key_of
from lib.config.methods import ALLOCATORS, PRUNERS, Method, Pattern
from lib.config.mixture import Mixture
from lib.config.quantization import Quantization
from lib.config.snapshot import FILE, MODEL, TEXT, Input, Snapshot
from lib.config.sources import ModelSource


@dataclass(frozen=True)
class SparsityPruning:
    """The settings of a run of `alp_prune.py`."""

    source: ModelSource
    model_name: str
    method: Method
    pattern: Pattern
    sparsity_ratio: float
    gradients: GradientSettings
    calibration_dataset: Mixture
    dataset: Sequence[str]
    output_dir: Path | None
    alpha: float
    nsamples: int = 128
    seed: int = 0
    owl_m: float = ALLOCATORS["owl"].flags["owl_m"]
    use_variant: bool = False
    a: float = PRUNERS["ria"].flags["a"]
    percdamp: float = PRUNERS["sparsegpt"].flags["percdamp"]
    quantization: Quantization | None = None
    gradient_file: Path | None = None
    seqlen: int | None = None
    batch_size: int | None = None
    overwrite: bool = False
    resume: bool = False
    save_model: Path | None = None
    log: Path | None = None
    eval_stride: int | None = None
    eval_windows: int | None = None  # of each text; None: all
    semi_structured: bool = False
    tasks: Sequence[str] = ()  # of lm_eval
    prompts: Path | None = None
    dry_run: bool = False
    snapshot: Snapshot | None = None  # of `inputs`, as they are before anything is read
    save_format: ClassVar[str] = "hf"  # the only one

    @property
    def model(self) -> str:
        return self.source.name

    @property
    def texts(self) -> Sequence[str]:
        """The evaluation texts."""
        return self.dataset

    @property
    def label(self) -> str:
        """The name of a cell of a grid, among the cells of its model."""
        seed = f" seed {self.seed}" if self.needs_inputs else ""
        return f"{self.method.name} {self.target_sparsity:g} {self.pattern}{seed}"

    @property
    def inputs(self) -> list[Input]:
        """Everything that the run reads: the model, its texts, the gradients, tasks and prompts."""
        texts = [*(self.calibration_dataset.read if self.needs_text else ()), *self.texts]
        gradients = [str(self.gradient_file)] if self.uses_gradients and self.gradient_file else []
        files = [*gradients, *self.tasks, *([str(self.prompts)] if self.prompts else [])]
        return [(MODEL, self.model), *((TEXT, name) for name in texts), *((FILE, name) for name in files)]

    @property
    def key(self) -> dict:
        """Everything that the result depends on."""
        pruner, allocator = self.method.pruning, self.method.allocation
        unused = {"log"} | {flag for entry in (*PRUNERS.values(), *ALLOCATORS.values()) for flag in entry.flags}
        unused -= {*pruner.flags, *(("percdamp",) if self.quantization else ())}
        unused -= set(allocator.flags if allocator and self.is_allocated else ())
        unused |= set() if pruner.prunes else {"sparsity_ratio", "pattern"}
        unused |= set() if self.needs_inputs else {"nsamples", "seed"}
        unused |= set() if self.needs_text else {"calibration_dataset"}
        unused |= set() if self.computes_gradients else {"gradients"}
        unused |= set() if self.prompts else {"prompts"}
        unused |= set() if self.uses_gradients and self.gradient_file else {"gradient_file"}
        gradients = {name: value for name, value in asdict(self.gradients).items() if name != "dataset"}
        as_json = {
            "method": self.method.name,
            "pattern": str(self.pattern),
            "gradients": gradients,
            "quantization": str(self.quantization) if self.quantization else None,
        }
        return key_of("alp_prune", self, unused, as_json)

    @property
    def needs_text(self) -> bool:
        """True when calibration text is read, for windows or for gradients."""
        return self.needs_inputs or self.computes_gradients

    @property
    def computes_gradients(self) -> bool:
        """True when the gradients are those of the settings, found or computed; False for a file that is given."""
        return self.uses_gradients and self.gradient_file is None

    @property
    def target_sparsity(self) -> float:
        """The share of the weights to prune."""
        return self.sparsity_ratio if self.method.pruning.prunes else 0.0

    @property
    def rounds_while_pruning(self) -> bool:
        """True when quantization starts from the dense weights, and prunes and rounds in one pass."""
        return self.quantization is not None and self.method.pruning.rounds_while_pruning

    @property
    def needs_inputs(self) -> bool:
        """True when calibration windows are needed."""
        is_compensated = self.quantization is not None and self.quantization.is_compensated
        return self._allocates_by("inputs") or self.method.pruning.needs_inputs or is_compensated

    @property
    def gradient_path(self) -> Path:
        """The file of sensitivities: the given one, or the default for this model and these settings."""
        return self.gradient_file or self.gradients.path(self.source.name, self.source.dtype)

    @property
    def is_allocated(self) -> bool:
        """True when each layer gets its own sparsity; N:M fixes the sparsity of every layer."""
        return not self.method.is_uniform and not self.pattern.is_structured

    @property
    def uses_gradients(self) -> bool:
        """True when the allocation comes from gradients."""
        return self._allocates_by("gradients")

    def _allocates_by(self, what: str) -> bool:
        allocation = self.method.allocation
        return self.is_allocated and allocation is not None and allocation.needs == what
