"""The workspace of the runs of `ppllms.py` on one model: loaded and checked before any work starts."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

import torch

from lib.config.depth import DepthPruning
from lib.config.mixture import Mixture
from lib.config.plan import Mode, Plan
from lib.config.sources import expand
from lib.data.corpora import load_corpus
from lib.data.inspection import describe_texts
from lib.data.sampling import calibration_windows, draw_parts, evaluation_windows
from lib.depth.budget import Budget, Counts, choose_counts
from lib.depth.moves import check_reachable, moves_of
from lib.depth.reap import check_experts
from lib.depth.trial_losses import Sweep
from lib.engine.own_text import check_not_on_disk
from lib.errors import InputError
from lib.evaluation.samples import make_prompts
from lib.evaluation.tasks import Tasks
from lib.export import gguf
from lib.export.huggingface import check_compact, check_format
from lib.models.decoder import Decoder
from lib.models.experts import picked_experts
from lib.models.limits import check_stride, check_tokens, window_length
from lib.models.loading import load_config, load_model, load_outline, load_tokenizer
from lib.models.matrices import dense_copies
from lib.models.modeling_pruned import skip_lists
from lib.models.offload import follow
from lib.models.residual_writers import has_writers, output_projections
from lib.reporting.console import Report
from lib.runs.single import Workspace
from lib.runtime.batching import Batcher, automatic_batch_size
from lib.runtime.distributed import Ranks


@dataclass(kw_only=True)
class DepthWorkspace(Workspace):
    """What runs on one model share, with what one of them found that the others reuse."""

    windows: dict[int, torch.Tensor]  # the calibration set (N, T), by seed
    compensation_windows: dict[int, torch.Tensor]  # those that projections are refitted on (N, T), by seed
    weights: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # and their dense copies, in a table
    bi_scores: dict[int, list[float]] = field(default_factory=dict)  # by seed
    _sweep: tuple[int, Sweep] | None = None

    def restore(self) -> None:
        """Restores the dense weights of all projections that a compensation may have changed."""
        follow(self.decoder.layers, [])
        for weight, copy in self.weights:
            weight.data.copy_(copy)

    def sweep(self, seed: int) -> Sweep:
        """What measures trials on the windows of a seed; kept until another seed is asked for."""
        if self._sweep is None or self._sweep[0] != seed:
            self._sweep = (seed, Sweep(self.decoder, self.windows[seed], self.batcher))
        sweep, state = self._sweep[1], self.state
        sweep.add_known(state.get("losses", {}))
        sweep.on_measured = lambda losses: state.put("losses", losses)
        return sweep


def prepare(report: Report, cells: Sequence[DepthPruning], ranks: Ranks) -> DepthWorkspace:
    """Loads and checks everything for runs on one model, which differ only in method, rate and seed.

    Raises `InputError`, before the weights are read where possible.
    """
    settings, source = cells[0], cells[0].source
    with report.timed("load"):
        config = load_config(source)
        seqlen = check_config(cells, config)
        tokenizer = load_tokenizer(source)
    with report.timed("data"):
        tasks = Tasks(settings.tasks) if settings.tasks else None
        texts = load_texts(report, cells, tokenizer, seqlen, config.vocab_size)
        prompts = make_prompts(source.name, settings.prompts, tokenizer, texts.evaluation.values(), config)
    with report.timed("load"):
        decoder = Decoder(load_model(source))
        for cell in cells:
            check_decoder(cell, decoder)
        if any(cell.is_sampled for cell in cells):
            check_not_on_disk(decoder)
    batch_size = ranks.agree(lambda: automatic_batch_size(decoder.device, seqlen, decoder.token_bytes))
    batcher = Batcher(settings.batch_size or batch_size, ranks)
    workspace = DepthWorkspace(
        tokenizer=tokenizer,
        decoder=decoder,
        batcher=batcher,
        seqlen=seqlen,
        windows=texts.calibration,
        compensation_windows=texts.compensation,
        eval_windows=texts.evaluation,
        tasks=tasks,
        prompts=prompts,
    )
    if settings.compensates and len(cells) > 1 and not decoder.is_on_disk:
        projections = output_projections(decoder)
        cause = f"--model_name {settings.model_name}: host memory has no room for a second copy of the weights that "
        weights = [one.weight for one in projections]
        copies = dense_copies(weights, cause + "--compensate changes, from which each cell of a table begins")
        workspace.weights = list(zip(weights, copies, strict=True))
    return workspace


def check_config(cells: Sequence[DepthPruning], config) -> int:
    """Checks all that needs no weights; returns the sequence length in tokens. Raises `InputError`."""
    seqlen = window_length(cells[0].model_name, config, cells[0].seqlen)
    check_stride(cells[0].eval_stride, seqlen)
    for settings in cells:
        check_layers(settings, config)
    outline = load_outline(config, cells[0].source.trust_remote_code)
    if outline is not None:
        decoder = Decoder(outline, has_weights=False)
        for settings in cells:
            check_decoder(settings, decoder)
    return seqlen


def check_layers(settings: DepthPruning, config) -> None:
    """Checks the numbers of layers of a run against the model's config. Raises `InputError`."""
    layers, name = config.num_hidden_layers, settings.model_name
    if settings.num_blocks not in (None, layers):
        raise InputError(f"--num_blocks {settings.num_blocks}: {name} has {layers} decoder layers; leave the flag out")
    if settings.saved_plan:
        planned = settings.saved_plan.plan.num_layers
        if planned != layers:
            raise InputError(f"--apply_plan: was made for {planned} decoder layers, but {name} has {layers}")
    else:
        whole = layers - sum(map(bool, skip_lists(config)))
        check_counts(settings, whole, f"{name} has {whole} {'' if whole == layers else 'whole '}decoder layers")


def check_counts(settings: DepthPruning, layers: int, having: str) -> None:
    """Raises `InputError` unless the given counts leave something of the layers that can be pruned."""
    if layers < 2 and settings.depth_method.removes != "sublayers":
        raise InputError(f"{having}; pruning needs at least 2")
    if settings.mha_remove_layers is not None and settings.mha_remove_layers >= layers:
        raise InputError(f"--mha_remove_layers {settings.mha_remove_layers}: {having}; one must stay")
    if (settings.ffn_remove_layers or 0) > layers:
        raise InputError(f"--ffn_remove_layers {settings.ffn_remove_layers}: {having}, no more")


def check_decoder(settings: DepthPruning, decoder: Decoder) -> None:
    """Checks a model, with or without weights, against the plan or budget, and against the save format."""
    removes_experts = settings.saved_plan.plan.experts_removed if settings.saved_plan else _removes_experts(settings)
    if removes_experts and settings.compensates:
        raise InputError("--compensate: has no meaning where experts are removed; leave it out")
    if removes_experts and settings.save_model and settings.save_format != "hf":
        is_gguf = settings.save_format == "gguf"
        named = f"--save_model {settings.save_model}" if is_gguf else f"--save_format {settings.save_format}"
        raise InputError(f"{named}: cannot hold a model with fewer experts; save a folder of format hf")
    if settings.saved_plan:
        plan = settings.saved_plan.plan
        for what, layers, absent in (
            ("attention", plan.mha_removed, [not mode.attention for mode in decoder.given_modes]),
            ("FFN", plan.ffn_removed, [not mode.ffn for mode in decoder.given_modes]),
        ):
            if gone := [layer for layer in layers if absent[layer]]:
                raise InputError(
                    f"--apply_plan: layer {gone[0]} of {settings.model_name} has no {what} to remove; "
                    "give the model that the plan was made for"
                )
        if read := sorted(set(decoder.read_attentions) & set(plan.mha_removed)):
            raise InputError(f"--apply_plan: other layers read the keys and values of layer {read[0]}; they must stay")
        if not decoder.keeps_attention(plan):
            kind = "full " if len(decoder.complete(plan).mha_removed) < decoder.num_layers else "any "
            raise InputError(f"--apply_plan: would leave {settings.model_name} without {kind}attention; one must stay")
        check_planned_experts(plan, decoder)
    elif settings.depth_method.removes == "counts":
        find_counts(settings, decoder)
    elif settings.depth_method.removes == "experts":
        check_experts(decoder, settings.prune_rate)
    else:
        check_reachable(decoder, moves_of(settings.depth_method, decoder), settings.prune_rate)
    if settings.compensates and decoder.has_weights and not has_writers(decoder):
        raise InputError(
            f"--compensate: no sublayer of {decoder.family} ends in a projection that writes into the residual stream; "
            "leave it out"
        )
    if settings.save_model and settings.save_format == "gguf":
        gguf.read(expand(settings.model_name), decoder.num_layers)
    elif settings.save_model:
        check_format(decoder, settings.save_format, settings.saved_plan.plan if settings.saved_plan else None)
        if settings.save_format != "masked" and not decoder.has_weights:
            check_removals(settings, decoder)


def check_planned_experts(plan: Plan, decoder: Decoder) -> None:
    """Raises `InputError` for a plan that removes experts that the model does not have, or too many."""
    left = set()
    for layer, removed in enumerate(plan.experts_removed):
        experts = decoder.experts[layer]
        if removed and (experts is None or max(removed) >= experts.count):
            raise InputError(f"--apply_plan: layer {layer} has no expert {max(removed)}; give the model of the plan")
        left |= {experts.count - len(removed)} if experts else set()
    if plan.experts_removed and (len(left) > 1 or min(left, default=0) < (picked_experts(decoder.config) or 1)):
        raise InputError("--apply_plan: would leave layers with different numbers of experts, or fewer than are picked")


def _removes_experts(settings: DepthPruning) -> bool:
    return settings.depth_method.removes == "experts"


def check_removals(settings: DepthPruning, outline: Decoder) -> None:
    """Checks on a model without weights that it can be saved without what a run removes.

    Before a search that is not known. Then removals of its kind are tried on the first, a middle and the last layer,
    together and, if that fails, one by one. Raises `InputError`.
    """
    if settings.saved_plan:
        check_compact(outline, settings.save_format, settings.saved_plan.plan)
        return
    if _removes_experts(settings):
        first = tuple(range(check_experts(outline, settings.prune_rate)))
        plan = Plan(outline.num_layers, experts_removed=tuple(first if one else () for one in outline.experts))
        check_compact(outline, settings.save_format, plan)
        return
    otherwise = ", or search without --save_model, and save with --apply_plan what the search found"
    layers, whole = outline.num_layers, outline.whole_layers
    tried = tuple(dict.fromkeys((*whole[:1], *whole[len(whole) // 2 :][:1], *whole[-1:])))
    for mode in _modes_left(settings, outline):
        with suppress(InputError):
            plan = Plan(layers, tried * (not mode.attention), tried * (not mode.ffn))
            if outline.keeps_attention(plan):
                check_compact(outline, settings.save_format, plan)
                continue
        for index in tried:
            plan = Plan(layers, (index,) * (not mode.attention), (index,) * (not mode.ffn))
            if outline.keeps_attention(plan):
                when = f", if layer {index} loses {_LOSSES[mode]}"
                check_compact(outline, settings.save_format, plan, when, otherwise)


_LOSSES = {Mode(False, False): "attention and FFN", Mode(attention=False): "its attention", Mode(ffn=False): "its FFN"}


def _modes_left(settings: DepthPruning, decoder: Decoder) -> list[Mode]:
    """The modes that a search may leave a layer in."""
    gone, no_attention, no_ffn = _LOSSES
    if settings.depth_method.removes == "counts":
        mha, ffn = find_counts(settings, decoder)
        return [gone] * (0 < min(mha, ffn)) + [no_attention] * (mha > ffn) + [no_ffn] * (mha < ffn)
    return [gone] if settings.depth_method.removes == "layers" else [gone, no_attention, no_ffn]


@dataclass(frozen=True)
class Texts:
    """The windows (N, T) that the runs on one model need."""

    calibration: dict[int, torch.Tensor]  # by seed
    compensation: dict[int, torch.Tensor]  # by seed
    evaluation: dict[str, torch.Tensor]  # by text


def load_texts(report: Report, cells: Sequence[DepthPruning], tokenizer, seqlen: int, vocab_size: int) -> Texts:
    """Reads and tokenizes the text that the runs need. Raises `InputError`."""
    settings = cells[0]
    seeds = dict.fromkeys(cell.seed for cell in cells if cell.needs_windows)
    names = dict.fromkeys([*(settings.dataset.read if seeds else ()), *settings.compensate_dataset.read])
    corpora = {name: load_corpus(name, "train", tokenizer) for name in names}
    evaluation = [load_corpus(text, "test", tokenizer) for text in settings.texts]
    for line in describe_texts(list(corpora.values()), evaluation):
        report.print(line)

    @cache
    def windows_of(mixture: Mixture, nsamples: int, seed: int) -> torch.Tensor:
        parts = draw_parts(mixture, corpora, tokenizer, nsamples, seqlen, seed, calibration_windows)
        if len(parts) > 1:
            counts = ", ".join(f"{len(windows)} of {text}" for text, windows in parts.items())
            report.print(f"Mixture     windows of {seqlen} tokens: {counts}, seed {seed}")
        return torch.cat(list(parts.values()))

    calibration = {seed: windows_of(settings.dataset, settings.nsamples, seed) for seed in seeds}
    compensation: dict[int, torch.Tensor] = {}
    if settings.compensates:
        for seed in dict.fromkeys(cell.seed for cell in cells):
            compensation[seed] = windows_of(settings.compensate_dataset, settings.compensation_nsamples, seed)
            if len(compensation[seed]) < 2:
                advice = "give more text, or a lower --seqlen"
                raise InputError(f"--compensate: needs at least 2 windows of {seqlen} tokens; {advice}")
    eval_windows = {
        text.name: evaluation_windows(text, tokenizer, seqlen, settings.eval_stride, settings.eval_windows)
        for text in evaluation
    }
    for tokens in (*calibration.values(), *compensation.values(), *eval_windows.values()):
        check_tokens(settings.model_name, tokens, vocab_size)
    return Texts(calibration, compensation, eval_windows)


def find_counts(settings: DepthPruning, decoder: Decoder) -> Counts:
    """How many layers lose attention and FFN, by the settings and the model's parameter counts."""
    budget = budget_of(decoder)
    ratio = budget.natural_ratio if settings.mha_ffn_ratio == "auto" else float(settings.mha_ffn_ratio)
    return choose_counts(budget, settings.prune_rate, ratio, settings.mha_remove_layers, settings.ffn_remove_layers)


def budget_of(decoder: Decoder) -> Budget:
    """The budget of the whole layers of a model; layers of different sizes count with their mean.

    Raises `InputError` when no layer is whole.
    """
    sizes = [decoder.sublayer_parameters(layer) for layer in decoder.paired_layers]
    if not sizes:
        raise InputError(
            f"{decoder.family}: no layer has both attention and FFN, as --method ppllms needs; use blockpruner or sleb"
        )
    mha, ffn = (sum(size[part] for size in sizes) / len(sizes) for part in (0, 1))
    return Budget(len(sizes), mha, ffn, decoder.total_parameters)
