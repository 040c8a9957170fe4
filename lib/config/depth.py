"""The settings of a run of `ppllms.py`. Imports no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.config.keys import key_of_evaluation, key_of_source
from lib.config.methods import DEPTH_METHODS, DepthMethod
from lib.config.plan import SavedPlan
from lib.config.sources import ModelSource, stamp


@dataclass(frozen=True)
class DepthPruning:
    """The settings of a run; the flags of `ppllms.py` have the same names and meanings.

    With a `saved_plan` nothing is searched, and the settings of the search and of its text have no effect.
    """

    source: ModelSource
    dataset: str
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
    beam_width: int = DEPTH_METHODS["beam"].flags["beam_width"]
    save_model: Path | None = None
    save_format: str = "hf"

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
    def key(self) -> dict:
        """Everything that the result depends on."""
        by_counts = {name: getattr(self, name) for name in ("mha_remove_layers", "ffn_remove_layers", "mha_ffn_ratio")}
        takes = self.depth_method.takes
        text = {"text": stamp(self.dataset), "nsamples": self.nsamples, "seed": self.seed}
        if self.saved_plan:
            plan = {"plan": asdict(self.saved_plan.plan)}
            return {**key_of_source(self.source), "tool": "ppllms", **plan, **self._key_of_evaluation}
        return {
            **key_of_source(self.source),
            "tool": "ppllms",
            "method": self.method,
            "prune_rate": self.prune_rate,
            **(by_counts if takes("mha_ffn_ratio") else {}),
            **(text if self.needs_windows else {"seed": self.seed}),
            **({"bi_windows": self.bi_windows} if takes("bi_windows") else {}),
            **({"beam_width": self.beam_width} if takes("beam_width") else {}),
            **self._key_of_evaluation,
        }

    @property
    def _key_of_evaluation(self) -> dict:
        return key_of_evaluation(self.texts, self.seqlen, self.eval_stride)

    @property
    def needs_windows(self) -> bool:
        """True when calibration text is needed."""
        return self.saved_plan is None and self.depth_method.needs_windows
