"""Loads and checks everything that a healing needs: the pruned model, its teacher, and the texts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from lib.config.healing import Healing
from lib.config.plan import plan_beside
from lib.data.corpora import load_corpus
from lib.data.inspection import describe_texts
from lib.data.sampling import calibration_windows, draw_parts, evaluation_windows
from lib.engine.tail import token_divergences
from lib.errors import InputError
from lib.evaluation.samples import make_prompts
from lib.evaluation.tasks import Tasks
from lib.export.huggingface import check_format
from lib.heal.adapters import find_linears
from lib.models.decoder import Decoder
from lib.models.limits import check_stride, check_tokens, dtype_name, window_length
from lib.models.loading import load_config, load_model, load_tokenizer
from lib.reporting.console import Report
from lib.runs.single import Workspace
from lib.runtime.batching import Batcher, automatic_batch_size
from lib.runtime.distributed import Ranks

_SAME_HEAD = 1e-3  # nats: the same head gives 0, but for kernels that differ by device
_LEAST_WINDOWS = 2  # one to train on, one held out


@dataclass(kw_only=True)
class HealWorkspace(Workspace):
    """A pruned model (`decoder`), the dense one, and the windows (N, T) that the first is trained on."""

    teacher: Decoder | None
    windows: torch.Tensor  # all of them; a part is held out

    @contextmanager
    def with_teacher(self) -> Iterator[None]:
        """Inside the block, the dense model is the one that is measured."""
        assert self.teacher, "there is no dense model"
        student = self.decoder
        self.decoder = self.teacher
        try:
            yield
        finally:
            self.decoder = student


def prepare(report: Report, cells: list[Healing], ranks: Ranks) -> HealWorkspace:
    """Raises `InputError`, before the weights are read where possible."""
    (settings,) = cells
    with report.timed("load"):
        config = load_config(settings.source)
        seqlen = check_config(cells, config)
        tokenizer = load_tokenizer(settings.source)
    with report.timed("data"):
        tasks = Tasks(settings.tasks) if settings.tasks else None
        windows, evaluation = load_texts(report, settings, tokenizer, seqlen, config.vocab_size)
        prompts = make_prompts(settings.model_name, settings.prompts, tokenizer, evaluation.values(), config)
    with report.timed("load"):
        student = Decoder(load_model(settings.source))
        check_student(settings, student)
        if settings.save_model:
            check_format(student, settings.save_format)
        teacher = load_teacher(settings, student) if settings.teacher else None
    batch_size = automatic_batch_size(student.device, seqlen, student.token_bytes)
    return HealWorkspace(
        tokenizer=tokenizer,
        decoder=student,
        teacher=teacher,
        has_dense=teacher is not None,
        batcher=Batcher(settings.batch_size or batch_size, ranks),
        seqlen=seqlen,
        windows=windows,
        eval_windows=evaluation,
        tasks=tasks,
        prompts=prompts,
    )


def check_config(cells: list[Healing], config) -> int:
    """Checks all that needs no weights; returns the sequence length in tokens. Raises `InputError`."""
    (settings,) = cells
    seqlen = window_length(settings.model_name, config, settings.seqlen)
    check_stride(settings.eval_stride, seqlen)
    return seqlen


def check_student(settings: Healing, student: Decoder) -> None:
    """Raises `InputError` for a model that cannot be trained here, or is not what the plan in its folder says."""
    linears = find_linears(student)
    if any(linear.weight.is_meta for linear in linears.values()):
        raise InputError(
            f"{settings.model_name}: does not fit the devices, and healing offloads nothing; use larger ones"
        )
    if not (saved := plan_beside(settings.model_name)):
        return
    try:
        modes = [saved.plan.mode(number) for number in saved.plan.numbers_in(student.num_layers)]
    except ValueError as error:
        raise InputError(f"--model {settings.model_name}: the plan in its folder is another's: it {error}") from error
    pairs = list(zip(student.given_modes, modes, strict=True))
    if any(given.attention > mode.attention or given.ffn > mode.ffn for given, mode in pairs):
        what = "has blocks that the plan in its folder removes, which a training would bring back"
        raise InputError(f"--model {settings.model_name}: {what}; give one that was saved with --save_format hf")


def load_teacher(settings: Healing, student: Decoder) -> Decoder:
    """The dense model, in the dtype of the pruned one. Raises `InputError` unless both have the same head.

    Pruning leaves the head as it is, and distances are measured with it.
    """
    assert settings.teacher
    source = replace(settings.source, name=settings.teacher, dtype=dtype_name(student.model))
    if (width := load_config(source).hidden_size) == student.config.hidden_size:
        teacher = Decoder(load_model(source))
        states = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0))
        logits = [one.logits(states.to(one.device, one.model.dtype)).detach().cpu() for one in (teacher, student)]
        if logits[0].shape == logits[1].shape and token_divergences(*logits).max() <= _SAME_HEAD:
            return teacher
    what = f"has another head than {settings.model_name}"
    raise InputError(f"--teacher {settings.teacher}: {what}; give the model that it was pruned from, or none")


def load_texts(
    report: Report, settings: Healing, tokenizer, seqlen: int, vocab_size: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The windows (N, T) to train on, and those of each evaluation text. Raises `InputError`."""
    corpora = {name: load_corpus(name, "train", tokenizer) for name in settings.dataset.read}
    evaluation = [load_corpus(text, "test", tokenizer) for text in settings.eval_datasets]
    for line in describe_texts(list(corpora.values()), evaluation):
        report.print(line)
    arguments = settings.dataset, corpora, tokenizer, settings.nsamples, seqlen, settings.seed
    windows = torch.cat(list(draw_parts(*arguments, calibration_windows).values()))
    if len(windows) < _LEAST_WINDOWS:
        needed = f"healing needs at least {_LEAST_WINDOWS} windows of {seqlen} tokens"
        raise InputError(f"--dataset {settings.dataset}: {needed}; give more text, or a lower --seqlen")
    eval_windows = {
        text.name: evaluation_windows(text, tokenizer, seqlen, settings.eval_stride, settings.eval_windows)
        for text in evaluation
    }
    for tokens in (windows, *eval_windows.values()):
        check_tokens(settings.model_name, tokens, vocab_size)
    return windows, eval_windows
