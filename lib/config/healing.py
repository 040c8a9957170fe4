"""The settings of a run of `python -m lib.heal`. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.config.keys import key_of
from lib.config.mixture import Mixture
from lib.config.snapshot import FILE, MODEL, TEXT, Input, Snapshot
from lib.config.sources import ModelSource


@dataclass(frozen=True)
class Healing:
    """The settings of a run; the flags of `python -m lib.heal` have the same names and meanings."""

    source: ModelSource  # of the pruned model
    teacher: str | None  # the name of the dense model; None: train on the text itself
    dataset: Mixture
    eval_datasets: list[str]
    output_dir: Path | None
    nsamples: int = 5000
    steps: int = 300
    rank: int = 32
    learning_rate: float = 2e-3
    train_batch_size: int = 8
    seed: int = 0
    seqlen: int | None = None
    batch_size: int | None = None
    overwrite: bool = False
    resume: bool = False
    eval_stride: int | None = None
    eval_windows: int | None = None  # of each text; None: all
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
    def models(self) -> tuple[str, ...]:
        """The pruned model, and its teacher."""
        return (self.model_name, *([self.teacher] if self.teacher else []))

    @property
    def inputs(self) -> list[Input]:
        """Everything that the run reads: models, texts, tasks and prompts."""
        files = [*self.tasks, *([str(self.prompts)] if self.prompts else [])]
        texts = [*self.dataset.read, *self.eval_datasets]
        models = [(MODEL, name) for name in self.models]
        return [*models, *((TEXT, name) for name in texts), *((FILE, name) for name in files)]

    @property
    def key(self) -> dict:
        """Everything that the result depends on."""
        unset = {name for name in ("teacher", "prompts") if not getattr(self, name)}
        return key_of("heal", self, unset, {})
