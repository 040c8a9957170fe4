"""The settings of a run of `ppllms.py`. Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.config.keys import key_of
from lib.config.methods import DEPTH_METHODS, DepthMethod
from lib.config.mixture import Mixture
from lib.config.plan import SavedPlan
from lib.config.snapshot import FILE, MODEL, TEXT, Input, Snapshot
from lib.config.sources import ModelSource

COMPENSATIONS = ("none", "nearest", "all")  # which output projections are refitted; see lib.depth.compensation


@dataclass(frozen=True)
class DepthPruning:
    """The settings of a run; the flags of `ppllms.py` have the same names and meanings.

    With a `saved_plan` nothing is searched, and the settings of the search and of its text have no effect.
    """

    source: ModelSource
    dataset: Mixture
    eval_datasets: list[str]
    output_dir: Path | None
    saved_plan: SavedPlan | None = None
    method: str = "ppllms"
    num_blocks: int | None = None
    prune_rate: float = 0.25
    mha_remove_layers: int | None = None
    ffn_remove_layers: int | None = None
    mha_ffn_ratio: float | str = DEPTH_METHODS["ppllms"].flags["mha_ffn_ratio"]
    nsamples: int = 128
    bi_windows: int | None = None
    eval_ppl: bool = True
    seed: int = 0
    seqlen: int | None = None
    batch_size: int | None = None
    overwrite: bool = False
    resume: bool = False
    eval_stride: int | None = None
    eval_windows: int | None = None  # of each text; None: all
    compensate: str = COMPENSATIONS[0]
    compensate_dataset: Mixture = Mixture()
    compensate_nsamples: int | None = None  # None: `nsamples`
    beam_width: int = DEPTH_METHODS["beam"].flags["beam_width"]
    tasks: Sequence[str] = ()  # of lm_eval
    save_model: Path | None = None
    save_format: str = "hf"
    prompts: Path | None = None
    dry_run: bool = False
    snapshot: Snapshot | None = None  # of `inputs`, as they are before anything is read

    @property
    def model_name(self) -> str:
        return self.source.name

    @property
    def depth_method(self) -> DepthMethod:
        """The entry of the method in the registry."""
        return DEPTH_METHODS[self.method]

    @property
    def texts(self) -> Sequence[str]:
        """The evaluation texts."""
        return self.eval_datasets if self.eval_ppl else ()

    @property
    def label(self) -> str:
        """The name of a cell of a grid, among the cells of its model."""
        return f"{self.method} {self.prune_rate:g} seed {self.seed}"

    @property
    def inputs(self) -> list[Input]:
        """Everything that the run reads: the model, its texts, tasks and prompts."""
        texts = [*(self.dataset.read if self.needs_windows else ()), *self.compensate_dataset.read, *self.texts]
        files = [*self.tasks, *([str(self.prompts)] if self.prompts else [])]
        return [(MODEL, self.model_name), *((TEXT, name) for name in texts), *((FILE, name) for name in files)]

    @property
    def key(self) -> dict:
        """Everything that the result depends on."""
        takes, flags = self.depth_method.takes, {flag for method in DEPTH_METHODS.values() for flag in method.flags}
        unused = {flag for flag in flags if not takes(flag)}
        if self.saved_plan:
            unused |= {"method", "prune_rate", "seed", *flags}
        if self.compensates:
            unused -= {"seed"} | (set() if self.compensate_nsamples else {"nsamples"})
        else:
            unused |= {"compensate_dataset", "compensate_nsamples"}
        if not self.eval_ppl:
            unused |= {"eval_datasets", "eval_stride", "eval_windows"}
        unused |= set() if self.prompts else {"prompts"}
        plan = asdict(self.saved_plan.plan) if self.saved_plan else None
        return key_of("ppllms", self, unused, {"saved_plan": plan})

    @property
    def is_sampled(self) -> bool:
        """True when the model itself makes some of the calibration text."""
        return self.needs_windows and self.dataset.is_sampled or self.compensate_dataset.is_sampled

    @property
    def compensates(self) -> bool:
        return self.compensate != COMPENSATIONS[0]

    @property
    def compensation_nsamples(self) -> int:
        """Calibration documents of the compensation."""
        return self.compensate_nsamples or self.nsamples

    @property
    def needs_windows(self) -> bool:
        """True when calibration text is needed."""
        return self.saved_plan is None and self.depth_method.needs_windows
