"""The run of `python -m lib.heal`: train a pruned model for a while, measure it, save it."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from lib.config.healing import Healing
from lib.config.plan import Plan
from lib.config.sources import local_path
from lib.errors import RunError
from lib.evaluation.answers import DENSE
from lib.evaluation.distance import Evaluation, as_fields
from lib.export.huggingface import save_pruned, save_weights
from lib.export.reload import SaveError
from lib.heal import report as heal_report
from lib.heal.adapters import SPARSE, Adapters, find_linears, share_of_zeros
from lib.heal.prepare import HealWorkspace, check_config, prepare
from lib.heal.training import CHECKS, MOST_HELD_OUT, Settings, Training, split
from lib.runs.outline import Part
from lib.runs.own_text import fill_in
from lib.runs.single import Run
from lib.runtime.batching import retry_once

_FILE = "training.safetensors"  # in the folder of the state
_BACKWARD = 2.0  # passes: a backward pass, through weights that are not trained themselves


class HealRun(Run[Healing, HealWorkspace]):
    """One run of `python -m lib.heal`."""

    tool = "heal"
    x_axis = ""  # there are no tables of such runs

    check_config = staticmethod(check_config)
    load = staticmethod(prepare)

    def show_model(self) -> None:
        heal_report.show_models(self.report, self.settings, self.decoder)

    @property
    def stages_after_dense(self) -> Sequence[str]:
        return ("pruned", "healed")

    def prune(self) -> dict:
        """Measures the pruned model and trains it; nothing more is pruned."""
        workspace, settings = self.workspace, self.settings
        evaluations: dict[str, dict[str, Evaluation]] = {text: {} for text in workspace.eval_windows}
        if workspace.teacher:
            with workspace.with_teacher():
                fill_in(self.report, workspace, settings.seed, [workspace.windows])
                self.measure(DENSE, evaluations)
        self.measure("pruned", evaluations)
        healing = self.heal()
        self.measure("healed", evaluations)
        heal_report.show_evaluations(self.report, evaluations, workspace.eval_windows)
        return {"healing": healing, **as_fields(evaluations)}

    def measure(self, stage: str, evaluations: dict[str, dict[str, Evaluation]]) -> None:
        """Evaluates the model of the workspace on every text, its samples and its tasks."""
        for text, stages in evaluations.items():
            stages[stage] = self.texts.measure(stage, text)
        self.samples.measure(stage)
        self.tasks.measure(stage)

    def heal(self) -> dict:
        """Trains adapters and merges them into the weights; returns the `healing` of result.json."""
        settings, workspace, state = self.settings, self.workspace, self.state
        linears = find_linears(self.decoder)
        zeros = share_of_zeros(linears)
        adapters = retry_once(partial(Adapters, linears, settings.rank, zeros >= SPARSE, settings.seed))
        windows, held_out = split(workspace.windows)
        how = Settings(settings.steps, settings.train_batch_size, settings.learning_rate, settings.seed)
        models = self.decoder, workspace.teacher
        training = retry_once(partial(Training, *models, adapters, windows, held_out, how, workspace.batcher))
        path, owner = state.folder / _FILE, f"{state.key} training"
        heal_report.show_training(self.report, settings, adapters, windows, held_out, zeros)
        if path.exists():
            training.restore(path, owner)
            for check in training.checks:
                heal_report.show_check(self.report, check, settings)
        show = partial(heal_report.show_check, self.report, settings=settings)
        with self.report.timed("train"), self.report.progress(settings.steps, "training") as progress:
            training.run(lambda: training.save(path, owner), show, progress)
        adapters.merge()
        heal_report.show_best(self.report, training)
        return {
            "teacher": settings.teacher,
            "changed": [[layer, path] for layer, path in linears],
            "parameters": sum(parameter.numel() for parameter in adapters.parameters()),
            "zeros": zeros,
            "keeps_zeros": zeros >= SPARSE,
            "windows": len(windows),
            "held_out_windows": len(held_out),
            "steps_taken": training.step,
            "best_step": training.best.step,
            "checks": list(map(asdict, training.checks)),
        }

    def describe(self) -> dict:
        settings = self.settings
        return {
            "model": settings.model_name,
            "model_path": local_path(settings.model_name),
            "dataset": str(settings.dataset),
            "nsamples": settings.nsamples,
            "steps": settings.steps,
            "rank": settings.rank,
            "learning_rate": settings.learning_rate,
            "train_batch_size": settings.train_batch_size,
            "seed": settings.seed,
            **self.describe_measuring(),
            **({"save_format": settings.save_format} if settings.save_model else {}),
        }

    def next_step(self, is_far: bool) -> str:
        return "more --steps and text, or removing less"

    def draw(self, result: dict) -> None:
        return None

    def parts(self) -> list[Part]:
        settings, windows = self.settings, len(self.workspace.windows)
        teacher = 1.0 if self.workspace.teacher else 0.0
        trained = settings.steps * settings.train_batch_size
        checked = (CHECKS + 1) * min(MOST_HELD_OUT, max(1, windows // 8))
        passes = trained * (1 + _BACKWARD + teacher) + checked * (1 + teacher)
        return [Part("training", passes, note=f"{settings.steps:,} steps of {settings.train_batch_size} windows")]

    def save_model(self, folder: Path) -> None:
        decoder, workspace, save_format = self.decoder, self.workspace, self.settings.save_format
        windows, checking = next(iter(workspace.eval_windows.values())), partial(self.report.timed, "check")
        try:
            if save_format == "hf":
                save_weights(decoder, workspace.tokenizer, folder, windows, checking)
            else:
                nothing = Plan(decoder.num_layers)
                save_pruned(decoder, nothing, workspace.tokenizer, folder, save_format, windows, checking)
        except SaveError as error:
            raise RunError(f"--save_format {save_format}: {error}") from error
