"""The workspace of `alp_prune.py` runs on one model: loaded and checked before any work starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from lib.config.gradients import GradientSettings
from lib.config.sparsity import SparsityPruning
from lib.config.tasks import flag_of
from lib.data.corpora import load_corpus
from lib.data.inspection import describe_texts
from lib.data.sampling import draw_parts, evaluation_windows, sampled_windows
from lib.engine.own_text import check_not_on_disk
from lib.errors import InputError
from lib.evaluation.samples import make_prompts
from lib.evaluation.tasks import Tasks
from lib.models.decoder import Decoder
from lib.models.limits import check_stride, check_tokens, window_length
from lib.models.loading import load_config, load_model, load_outline, load_tokenizer
from lib.models.matrices import (
    InputGroup,
    Matrices,
    Matrix,
    check_columns,
    check_not_offloaded,
    dense_copies,
    find_matrices,
    input_groups,
)
from lib.models.offload import follow
from lib.reporting.console import Report
from lib.runs.single import Workspace
from lib.runtime.batching import Batcher, automatic_batch_size
from lib.runtime.device import resolve_device
from lib.runtime.distributed import Ranks
from lib.sensitivity import artifact, compute
from lib.sparsity import semi_structured_kernels

_GIVEN = "give the file of this model, or leave --gradients out"
_NO_ROOM = (
    "--model {}: host memory has no room for a second copy of its weights, from which each cell of a table, and "
    "rounding by sparsegpt, begins"
)
_OUR_FILE = "move the file away, and it is made anew"


@dataclass(frozen=True)
class Texts:
    """The windows (N, T) that the runs on one model need."""

    calibration: dict[int, torch.Tensor]  # by seed
    gradients: dict[GradientSettings, torch.Tensor]
    evaluation: dict[str, torch.Tensor]


@dataclass(kw_only=True)
class SparsityWorkspace(Workspace):
    """What the runs on one model share, including results that later runs reuse."""

    groups: list[list[InputGroup]]
    calibration: dict[int, torch.Tensor]  # windows (N, T), by seed
    gradient_windows: dict[GradientSettings, torch.Tensor]  # (N, T)
    gradients: dict[GradientSettings, artifact.Artifact]  # those loaded or computed so far
    weights: list[torch.Tensor]  # dense copies, one per matrix; empty unless a run restores them
    scores: dict[tuple, list[float]] = field(default_factory=dict)  # of OWL and DLP, by their settings

    @cached_property
    def fingerprint(self) -> str:
        """That of the dense model: to be asked for the first time while it is dense."""
        return self.batcher.ranks.agree(partial(artifact.fingerprint, self.decoder))

    @property
    def matrices(self) -> list[Matrix]:
        return [matrix for layer in self.groups for group in layer for matrix in group.matrices]

    def restore(self) -> None:
        """Restores the dense weights of the matrices."""
        follow(self.decoder.layers, [])
        for matrix, weight in zip(self.matrices, self.weights, strict=False):
            matrix.stored.data.copy_(weight)


def prepare(report: Report, cells: Sequence[SparsityPruning], ranks: Ranks) -> SparsityWorkspace:
    """Loads and checks everything for runs on one model that differ only in method, sparsity and seed.

    Raises `InputError`, before the weights are read if possible.
    """
    settings, by_gradients = cells[0], {cell.gradients: cell for cell in cells if cell.uses_gradients}
    gradients = known_gradients(by_gradients, ranks)
    with report.timed("load"):
        if settings.semi_structured:
            semi_structured_kernels.check_device(resolve_device(settings.source.device))
        config = load_config(settings.source)
        seqlen = check_config(cells, config)
        tokenizer = load_tokenizer(settings.source)
    with report.timed("data"):
        tasks = Tasks(settings.tasks, flag_of(settings.tasks)) if settings.tasks else None
        texts = load_texts(report, cells, tokenizer, seqlen, config.vocab_size)
        prompts = make_prompts(settings.model, settings.prompts, tokenizer, texts.evaluation.values(), config)
        check_found(gradients, by_gradients, texts.gradients, is_sampled=False)
    with report.timed("load"):
        decoder = load_decoder(cells)
        groups = input_groups(decoder)
    batch_size = ranks.agree(lambda: automatic_batch_size(decoder.device, seqlen, decoder.token_bytes))
    batcher = Batcher(settings.batch_size or batch_size, ranks)
    for asked, windows in texts.gradients.items():
        compute.add_own_text(report, windows, tokenizer, decoder, asked.seed, ranks)
    check_found(gradients, by_gradients, texts.gradients, is_sampled=True)
    workspace = SparsityWorkspace(
        tokenizer=tokenizer,
        decoder=decoder,
        batcher=batcher,
        seqlen=seqlen,
        eval_windows=texts.evaluation,
        prompts=prompts,
        groups=groups,
        calibration=texts.calibration,
        gradient_windows=texts.gradients,
        gradients=gradients,
        weights=[],
        tasks=tasks,
    )
    for asked, known in gradients.items():
        path = by_gradients[asked].gradient_path
        advice = _OUR_FILE if by_gradients[asked].computes_gradients else _GIVEN
        artifact.check_model(known, path, settings.model, decoder, workspace.fingerprint, advice)
    if (len(cells) > 1 or settings.rounds_while_pruning) and not decoder.is_on_disk:
        workspace.weights = dense_copies([one.stored for one in workspace.matrices], _NO_ROOM.format(settings.model))
    return workspace


def known_gradients(
    by_gradients: Mapping[GradientSettings, SparsityPruning], ranks: Ranks
) -> dict[GradientSettings, artifact.Artifact]:
    """The artifacts that there are, of those that runs ask for. Raises `InputError` for a given file without one."""
    found = {
        asked: compute.find(cell.gradient_path, must_exist=cell.gradient_file is not None, ranks=ranks)
        for asked, cell in by_gradients.items()
    }
    return {asked: known for asked, known in found.items() if known}


def load_decoder(cells: Sequence[SparsityPruning]) -> Decoder:
    """The model of the runs, checked against all of them. Raises `InputError`."""
    settings, decoder = cells[0], Decoder(load_model(cells[0].source))
    if settings.semi_structured and decoder.is_offloaded:
        raise InputError("--semi_structured: is for models that fit the device; leave it, or --offload, out")
    for cell in cells:
        check_not_offloaded(decoder, check_matrices(cell, decoder))
    if any(cell.needs_text for cell in cells) and settings.calibration_dataset.is_sampled:
        check_not_on_disk(decoder)
    return decoder


def check_found(
    gradients: Mapping[GradientSettings, artifact.Artifact],
    by_gradients: Mapping[GradientSettings, SparsityPruning],
    windows: Mapping[GradientSettings, torch.Tensor],
    is_sampled: bool,
) -> None:
    """Raises `InputError` unless the artifacts that were found by settings are of these, and of the same windows.

    `is_sampled`: those on text that the model makes, which there is once it is loaded; else all others.
    """
    for asked, known in gradients.items():
        cell = by_gradients[asked]
        if cell.computes_gradients and asked.dataset.is_sampled == is_sampled:
            artifact.check_settings(known, cell.gradient_path, asked, windows[asked], _OUR_FILE)


def check_config(cells: Sequence[SparsityPruning], config) -> int:
    """Runs the checks that need no weights; returns the window length in tokens. Raises `InputError`."""
    seqlen = window_length(cells[0].model, config, cells[0].seqlen)
    check_stride(cells[0].eval_stride, seqlen)
    if any(cell.computes_gradients for cell in cells):
        window_length(cells[0].model, config, cells[0].gradients.seqlen, "--grad_seqlen")
    outline = load_outline(config, cells[0].source.trust_remote_code)
    if outline is not None:
        decoder = Decoder(outline, has_weights=False)
        for cell in cells:
            check_matrices(cell, decoder)
    return seqlen


def check_matrices(settings: SparsityPruning, decoder: Decoder) -> list[Matrices]:
    """Returns the matrices of every layer. Raises `InputError` unless all can be pruned and quantized as requested."""
    matrices = find_matrices(decoder)
    if settings.pattern.is_structured and settings.method.pruning.prunes:
        check_columns(matrices, settings.pattern.m, f"--sparsity_type {settings.pattern}")
    if settings.semi_structured:
        semi_structured_kernels.check_matrices(matrices, decoder.has_weights)
    if settings.quantization and settings.quantization.group_size:
        check_columns(matrices, settings.quantization.group_size, f"--groupsize {settings.quantization.group_size}")
    return matrices


def load_texts(report: Report, cells: Sequence[SparsityPruning], tokenizer, seqlen: int, vocab_size: int) -> Texts:
    """Reads and tokenizes the text that the runs need."""
    settings, calibration, gradients = cells[0], {}, {}
    needs_text = any(cell.needs_text for cell in cells)
    mixture = settings.calibration_dataset
    corpora = {text: load_corpus(text, "train", tokenizer) for text in (mixture.read if needs_text else ())}
    texts = [load_corpus(text, "test", tokenizer) for text in settings.dataset]
    for line in describe_texts(list(corpora.values()), texts):
        report.print(line)
    for seed in dict.fromkeys(cell.seed for cell in cells if cell.needs_inputs):
        parts = draw_parts(mixture, corpora, tokenizer, settings.nsamples, seqlen, seed, sampled_windows)
        calibration[seed] = torch.cat(list(parts.values()))
    for asked in dict.fromkeys(cell.gradients for cell in cells if cell.computes_gradients):
        gradients[asked] = compute.gradient_windows(asked, corpora, tokenizer)
    evaluation = {
        text.name: evaluation_windows(text, tokenizer, seqlen, settings.eval_stride, settings.eval_windows)
        for text in texts
    }
    for windows in (*calibration.values(), *gradients.values(), *evaluation.values()):
        check_tokens(settings.model, windows, vocab_size)
    return Texts(calibration, gradients, evaluation)
