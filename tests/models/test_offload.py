"""Models whose layers come and go: whatever is computed with them is, to the bit, what it is with a resident model."""

import math
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lib.config.methods import Pattern
from lib.config.plan import Plan
from lib.config.quantization import Quantization
from lib.config.sources import ModelSource
from lib.depth.block_influence import block_influence
from lib.depth.greedy import greedy_search
from lib.depth.trial_losses import Sweep
from lib.engine.window_scores import plan_window_losses
from lib.evaluation.perplexity import perplexity
from lib.export.huggingface import save_pruned, save_weights
from lib.models import offload
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from lib.models.matrices import input_groups
from lib.models.offload import OffloadedLayer, fetched_by_forward, follow, offloaded
from lib.models.weight_deltas import Changes, difference
from lib.runtime import memory
from lib.runtime.batching import Batcher
from lib.runtime.launcher import Launch
from lib.sensitivity import artifact
from lib.sensitivity.gradients import connection_sensitivity
from lib.sparsity.layerwise import count_zeros, prune_layers
from lib.sparsity.outlier_scores import layer_scores, median
from lib.sparsity.pruners import Admm, Magnitude, Ria, Rounded, SparseGpt, Wanda
from tests.families import FAMILIES, LINEAR_FAMILIES, tiny_model, tiny_windows

WINDOWS = tiny_windows(5)
PLAN = Plan(4, mha_removed=(2, 0), ffn_removed=(1, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model of each family as a checkpoint, made when asked for."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = root / family
            tiny_model(family).save_pretrained(made[family])
        return made[family]

    return folder


def load(folder: Path, mode: str, dtype: str = "auto") -> Decoder:
    return Decoder(load_model(ModelSource(str(folder), dtype, offload=mode)))


def weights_of(decoder: Decoder) -> dict[str, torch.Tensor]:
    """All weights of the layers, wherever they are."""
    found = {}
    for index, layer in enumerate(decoder.layers):
        with decoder.at(index):
            found |= {f"{index}.{name}": p.detach().clone() for name, p in layer.named_parameters()}
    return found


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", ["cpu", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_influence_search_and_perplexity_are_those_of_a_resident_model(family, mode, folders):
    resident, other = load(folders(family), "none"), load(folders(family), mode)
    assert other.is_offloaded and not resident.is_offloaded
    assert block_influence(other, WINDOWS, Batcher(2)) == block_influence(resident, WINDOWS, Batcher(2))
    search = [greedy_search(Sweep(d, WINDOWS, Batcher(2)), [2, 1, 3], 2) for d in (resident, other)]
    assert search[0] == search[1]
    found = [perplexity(plan_window_losses(d, PLAN, Batcher(2)), WINDOWS, stride=5) for d in (resident, other)]
    assert found[0] == found[1]
    assert other.total_parameters == resident.total_parameters


PRUNERS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": Ria(Pattern(2, 4)),
    "sparsegpt": SparseGpt(),
    "admm": Admm(),
}


@pytest.mark.parametrize("mode", ["cpu", "disk"])
@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_weights_are_pruned_as_in_a_resident_model(family, mode, folders, tmp_path):
    name = list(PRUNERS)[LINEAR_FAMILIES.index(family) % len(PRUNERS)]
    found = []
    for each in ("none", mode):
        decoder, changes = load(folders(family), each), Changes(tmp_path / each)
        follow(decoder.layers, [changes])
        groups, sparsities = input_groups(decoder), [0.3, 0.5, 0.6, 0.7]
        prune_layers(decoder, groups, PRUNERS[name], sparsities, WINDOWS, Batcher(2), changes=changes)
        losses = perplexity(plan_window_losses(decoder, Plan(4), Batcher(2)), WINDOWS)
        found.append((weights_of(decoder), losses, count_zeros(decoder, groups)))
    assert are_equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("mode", ["cpu", "disk"])
def test_every_pruner_gives_the_same_and_so_does_rounding_after_it(mode, folders, tmp_path):
    rounder = Rounded(Quantization(4, is_compensated=True, group_size=16))
    for name, pruner in PRUNERS.items():
        found = []
        for each in ("none", mode):
            decoder = load(folders("Qwen2"), each, "bfloat16")
            first, second = (Changes(tmp_path / name / each / stage) for stage in ("pruned", "quantized"))
            groups, sparsities = input_groups(decoder), [0.5] * 4
            for one, changes in ((pruner, [first]), (rounder, [first, second])):
                follow(decoder.layers, changes)
                prune_layers(decoder, groups, one, sparsities, WINDOWS, Batcher(2), changes=changes[-1])
            found.append(weights_of(decoder))
        assert are_equal(*found), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["cpu", "disk"])
def test_sensitivities_scores_and_fingerprints_are_the_same(mode, dtype, folders):
    for family in ("Llama", "Gemma2", "LlamaTied"):
        resident, other = (load(folders(family), each, dtype) for each in ("none", mode))
        assert connection_sensitivity(other, WINDOWS) == connection_sensitivity(resident, WINDOWS)
        assert artifact.fingerprint(other) == artifact.fingerprint(resident)
        scores = [layer_scores(d, input_groups(d), WINDOWS, Batcher(2), median) for d in (resident, other)]
        assert scores[0] == scores[1]


def test_one_layer_at_a_time_has_its_weights(folders, tmp_path, monkeypatch):
    decoder, here, most = load(folders("Llama"), "disk"), set(), []
    whole = OffloadedLayer._install, OffloadedLayer._release
    monkeypatch.setattr(
        OffloadedLayer, "_install", lambda self: (here.add(self.index), most.append(len(here)), whole[0](self))
    )
    monkeypatch.setattr(OffloadedLayer, "_release", lambda self: (here.remove(self.index), whole[1](self)))
    changes = Changes(tmp_path)
    follow(decoder.layers, [changes])
    block_influence(decoder, WINDOWS, Batcher(2))
    assert len(most) == 4, "each layer comes once for all windows"
    greedy_search(Sweep(decoder, WINDOWS, Batcher(2)), [2, 1, 3], 2)
    prune_layers(decoder, input_groups(decoder), Wanda(), [0.5] * 4, WINDOWS, Batcher(2), changes=changes)
    connection_sensitivity(decoder, WINDOWS)
    assert max(most) == 1 and not here
    assert all(p.is_meta for layer in decoder.layers for p in layer.parameters())


def test_layers_that_are_closed_do_not_come(folders, monkeypatch):
    decoder, fetched, fetch = load(folders("Llama"), "disk"), [], OffloadedLayer.fetch
    installed, install = [], OffloadedLayer._install

    def count(self):
        fetched.append(self.index)
        return fetch(self)

    monkeypatch.setattr(OffloadedLayer, "fetch", count)
    monkeypatch.setattr(OffloadedLayer, "_install", lambda self: (installed.append(self.index), install(self)))
    losses = plan_window_losses(decoder, Plan(4, (1, 2), (1, 2)), Batcher(2))
    perplexity(losses, WINDOWS)
    assert installed == [0, 3]
    offloaded(decoder.layers[0])._ahead._thread.submit(int).result()  # waits for what is fetched ahead
    before = len(fetched)
    perplexity(losses, WINDOWS)
    assert installed == [0, 3, 0, 3] and set(fetched[before:]) == {0, 3}, "the first time layer 1 was expected"


@pytest.mark.parametrize("mode", ["cpu", "disk"])
def test_a_layer_is_fetched_while_the_one_before_it_runs(mode, folders, tmp_path, monkeypatch):
    """Both up and down the layers; not again once it is there, and again when its weights have changed since."""
    decoder, fetched, fetch = load(folders("Llama"), mode), [], OffloadedLayer.fetch

    def note(self):
        fetched.append((self.index, threading.current_thread() is threading.main_thread()))
        return fetch(self)

    def run(*layers: int) -> None:
        for layer in layers:
            with decoder.at(layer):
                offloaded(decoder.layers[0])._ahead._thread.submit(int).result()  # waits for what is fetched ahead

    monkeypatch.setattr(OffloadedLayer, "fetch", note)
    run(0)
    fetched.clear()
    run(1, 2, 3, 2, 1, 0)  # layer 1 is there already
    assert [index for index, is_main in fetched if is_main] == [2], "the turn was not expected"
    assert [index for index, is_main in fetched if not is_main] == [2, 3, 1, 0]
    with decoder.at(1):
        weight = decoder.layers[1].mlp.up_proj.weight.clone()
    run(3, 0)  # and layer 1 ahead
    if mode == "disk":
        Changes(tmp_path).write(1, {"mlp.up_proj.weight": difference(weight, torch.zeros_like(weight))})
        follow(decoder.layers, [Changes(tmp_path)])
    else:
        layer = offloaded(decoder.layers[1])
        with layer.here():
            decoder.layers[1].mlp.up_proj.weight.zero_()
            run(0)  # and layer 1 once more
            decoder.keep(1)
    with decoder.at(1):
        assert not decoder.layers[1].mlp.up_proj.weight.any()


def test_with_little_memory_no_layer_is_fetched_ahead(folders, monkeypatch):
    monkeypatch.setattr(offload, "free_bytes", lambda device: 0)
    decoder, fetch = load(folders("Llama"), "disk"), OffloadedLayer.fetch

    def fetch_here(self):
        assert threading.current_thread() is threading.main_thread()
        return fetch(self)

    monkeypatch.setattr(OffloadedLayer, "fetch", fetch_here)
    block_influence(decoder, WINDOWS, Batcher(2))
    assert offloaded(decoder.layers[0])._ahead._next is None


def test_what_fails_ahead_is_tried_again_where_it_is_needed(folders, monkeypatch):
    decoder, fetch = load(folders("Llama"), "disk"), OffloadedLayer.fetch
    expected = block_influence(decoder, WINDOWS, Batcher(2))

    def fail(self):
        if threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError("out of memory")
        return fetch(self)

    monkeypatch.setattr(OffloadedLayer, "fetch", fail)
    assert block_influence(decoder, WINDOWS, Batcher(2)) == expected


def test_little_host_memory_means_more_walks_with_the_same_result(folders, monkeypatch):
    decoder = load(folders("Llama"), "disk")
    expected = (
        block_influence(decoder, WINDOWS, Batcher(2)),
        greedy_search(Sweep(decoder, WINDOWS, Batcher(2)), [2, 1], 1),
    )
    monkeypatch.setattr("lib.engine.map_windows.free_host_memory", lambda: 1)
    found = block_influence(decoder, WINDOWS, Batcher(2)), greedy_search(Sweep(decoder, WINDOWS, Batcher(2)), [2, 1], 1)
    assert found == expected


def test_progress_is_told_layer_by_layer_and_adds_up(folders):
    for mode in ("none", "disk"):
        seen = []
        block_influence(load(folders("Llama"), mode), WINDOWS, Batcher(2), seen.append)
        assert sum(seen) == pytest.approx(len(WINDOWS)) and min(seen) >= 0
        assert len([step for step in seen if step]) >= 4


# Saving


@pytest.mark.parametrize("mode", ["cpu", "disk"])
@pytest.mark.parametrize("save_format", ["hf", "masked"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPTNeoX", "Falcon", "Phi3", "Mixtral", "GPT2"])
def test_the_saved_model_is_that_of_a_resident_one(family, save_format, mode, folders, tmp_path):
    for each in ("none", mode):
        decoder = load(folders(family), each)
        save_pruned(decoder, PLAN, None, tmp_path / each, save_format, max_shard_size="20KB")
    names = [
        sorted(p.name for p in (tmp_path / each).iterdir() if "safetensors" not in p.name) for each in ("none", mode)
    ]
    assert names[0] == names[1]  # how many shards there are is transformers' choice
    shards = [
        {k: v for f in (tmp_path / each).glob("*.safetensors") for k, v in load_file(f).items()}
        for each in ("none", mode)
    ]
    assert are_equal(*shards)
    assert (tmp_path / "none/config.json").read_text() == (tmp_path / mode / "config.json").read_text()


@pytest.mark.parametrize("mode", ["cpu", "disk"])
def test_a_model_for_vllm_is_that_of_a_resident_one(mode, folders, tmp_path):
    plan = Plan(4, mha_removed=(2, 3), ffn_removed=(1, 2))
    for each in ("none", mode):
        save_pruned(load(folders("Llama"), each), plan, None, tmp_path / each, "nemotron-nas", max_shard_size="20KB")
    files = [{p.name: p.read_bytes() for p in (tmp_path / each).iterdir()} for each in ("none", mode)]
    assert files[0] == files[1] and len(files[0]) > 6


@pytest.mark.parametrize("mode", ["cpu", "disk"])
def test_pruned_weights_are_saved_and_the_given_checkpoint_is_untouched(mode, folders, tmp_path):
    folder = folders("Qwen3")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    decoder, changes = load(folder, mode), Changes(tmp_path / "changes")
    follow(decoder.layers, [changes])
    prune_layers(decoder, input_groups(decoder), SparseGpt(), [0.5] * 4, WINDOWS, Batcher(2), changes=changes)
    expected = perplexity(plan_window_losses(decoder, Plan(4), Batcher(2)), WINDOWS)
    save_weights(decoder, None, tmp_path / "out")
    saved = Decoder(load_model(ModelSource(str(tmp_path / "out"), offload="none")))
    assert perplexity(plan_window_losses(saved, Plan(4), Batcher(2)), WINDOWS) == expected
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_that_lost_sublayers_before_is_streamed_too(folders, tmp_path):
    save_pruned(load(folders("Llama"), "none"), PLAN, None, tmp_path / "pruned")
    found = [block_influence(load(tmp_path / "pruned", mode), WINDOWS, Batcher(2)) for mode in ("none", "cpu", "disk")]
    assert found[0] == found[1] == found[2]


def test_a_checkpoint_in_torchs_own_format_is_streamed_too(folders, tmp_path):
    model = tiny_model("Llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = [block_influence(load(tmp_path, mode), WINDOWS, Batcher(2)) for mode in ("none", "disk")]
    assert found[0] == found[1]


def test_whole_forwards_fetch_layer_by_layer(folders):
    ids = WINDOWS[:2]
    expected = load(folders("Llama"), "none").model(input_ids=ids).logits
    for mode in ("cpu", "disk"):
        decoder = load(folders("Llama"), mode)
        with fetched_by_forward(decoder.layers):
            assert torch.equal(decoder.model(input_ids=ids).logits, expected)
            with pytest.raises(Exception, match="."):
                decoder.model(input_ids=ids, position_embeddings="wrong")
        assert all(offloaded(layer)._uses == 0 for layer in decoder.layers)


# What fits


@pytest.mark.parametrize(
    "free, on_host, expected", [(1000, 10000, "none"), (100, 10000, "cpu"), (100, 100, "disk"), (1000, 100, "none")]
)
def test_what_does_not_fit_the_device_waits_in_host_memory_and_else_on_disk(free, on_host, expected, monkeypatch):
    model = nn.Linear(10, 10, bias=False)  # 400 bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(offload, "free_host_memory", lambda: on_host)
    assert offload.choose("auto", model, torch.float32, torch.device("cuda:0")) == expected
    assert offload.choose("cpu", model, torch.float32, torch.device("cuda:0")) == "cpu"


@pytest.mark.parametrize(
    "line, base, names",
    [
        ("0::/job/step", "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/job/step",
            "sys/fs/cgroup/memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_the_tightest_control_group_counts_and_what_can_be_reclaimed_is_free(line, base, names, tmp_path):
    limit, usage, reclaimable = names

    def group(path: str, allowed: str, used: int, files: int) -> None:
        folder = tmp_path / base / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{allowed}\n")
        (folder / usage).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{reclaimable} {files}\n")

    assert memory.group_memory(tmp_path) == math.inf
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:pids:/\n{line}\n")
    group("", "max", 0, 0)
    group("job/step", "max", 10, 0)
    assert memory.group_memory(tmp_path) == math.inf
    group("job", "1000", 700, 200)
    assert memory.group_memory(tmp_path) == 500
    group("job/step", "400", 300, 50)
    assert memory.group_memory(tmp_path) == 150


def test_processes_beside_each_other_share_the_memory(monkeypatch):
    monkeypatch.setattr(memory, "group_memory", lambda: 1000)
    assert memory.free_host_memory() == 1000
    monkeypatch.setattr(memory, "launched", lambda: Launch(0, 8, 0, 4))
    assert memory.free_host_memory() == 250


def test_on_a_cpu_what_does_not_fit_stays_on_disk(monkeypatch, folders):
    assert not load(folders("Llama"), "auto").is_offloaded
    monkeypatch.setattr(offload, "free_host_memory", lambda: 1000)
    assert load(folders("Llama"), "auto").is_on_disk
    assert not load(folders("Llama"), "none").is_offloaded
