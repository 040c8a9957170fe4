"""What is saved is what was measured: every save is loaded again, and a difference fails it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lib.export.huggingface
import lib.export.reload
from lib.config.plan import Plan
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import evaluation_windows
from lib.errors import InputError
from lib.evaluation.perplexity import perplexity
from lib.export.huggingface import save_pruned, save_weights
from lib.export.reload import SaveError, check_window, distance, tolerance
from lib.models.decoder import Decoder
from lib.models.loading import load_config, load_model, load_tokenizer
from tests import reference
from tests.command import run, run_alp
from tests.families import tiny_model, tiny_windows

MIXED = Plan(4, mha_removed=(2, 1), ffn_removed=(0, 2))
APART = "would not be the measured one: its logits on a window of text are .* apart"
FORMATS = ["hf", "masked", "nemotron-nas"]


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("v_proj.weight"))
    tensors[name][0] += 0.1
    save_file(tensors, path, {"format": "pt"})


def lose_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if "down_proj" not in name}, path, {"format": "pt"})


def write_nan(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def change_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


def halve_precision(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))


@pytest.fixture
def damaged(monkeypatch):
    """Lets a function change every folder right after it was written."""

    def after(change) -> None:
        write = lib.export.huggingface._write

        def damaging(model, tokenizer, folder, *args) -> None:
            write(model, tokenizer, folder, *args)
            change(folder)

        monkeypatch.setattr(lib.export.huggingface, "_write", damaging)

    return after


@pytest.mark.parametrize("change", [damage_weights, write_nan, change_config, halve_precision])
@pytest.mark.parametrize("save_format", FORMATS)
def test_a_folder_that_gives_other_logits_is_an_error(save_format, change, damaged, tmp_path):
    damaged(change)
    with pytest.raises(SaveError, match=APART):
        save_pruned(Decoder(tiny_model("Llama")), MIXED, None, tmp_path / "out", save_format)
    with pytest.raises(SaveError, match=APART):
        save_weights(Decoder(tiny_model("Llama")), None, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "reason"),
    [(lose_weights, "down_proj"), (lambda folder: (folder / "config.json").unlink(), "config.json")],
)
def test_a_folder_that_does_not_load_is_an_error(change, reason, damaged, tmp_path):
    damaged(change)
    with pytest.raises(SaveError, match=rf"^the saved model would not load again \(.*{reason}.*\)$"):
        save_pruned(Decoder(tiny_model("Llama")), MIXED, None, tmp_path / "out")


def test_a_model_that_gives_nan_is_saved_as_it_is(tmp_path):
    model = tiny_model("Llama")
    model.model.norm.weight[0] = float("nan")
    save_pruned(Decoder(model), MIXED, None, tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_what_is_compared_is_the_model_under_its_plan(monkeypatch, tmp_path):
    """A save that leaves a sublayer in fails."""
    whole = lib.export.huggingface.compact
    monkeypatch.setattr(lib.export.huggingface, "compact", lambda decoder, plan: whole(decoder, Plan(4, (2, 1), (2,))))
    with pytest.raises(SaveError, match=APART):
        save_pruned(Decoder(tiny_model("Llama")), MIXED, None, tmp_path / "out")


def test_without_room_for_two_models_the_layers_of_the_saved_one_come_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.export.reload, "free_bytes", lambda device: 0)
    reloaded, held, load, forward = [], [], AutoModelForCausalLM.from_pretrained, torch.nn.Linear.forward

    def loaded(*args, **options):
        model, information = load(*args, **options)
        reloaded.append(model)
        return model, information

    def watched(linear, hidden_states):
        for model in reloaded:
            held.append(sum(any(not p.is_meta for p in layer.parameters()) for layer in model.model.layers))
        return forward(linear, hidden_states)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    save_pruned(Decoder(tiny_model("Llama")), MIXED, None, tmp_path / "out")
    assert max(held) == 1


@pytest.mark.parametrize("windows", [None, tiny_windows(3, 50)])
def test_the_window_is_short_and_fits_the_model(windows):
    decoder = Decoder(tiny_model("Llama"))
    first, again = check_window(decoder, windows), check_window(decoder, windows)
    assert torch.equal(first, again) and first.shape == ((1, 64) if windows is None else (1, 50))
    assert first.max() < 96 and check_window(decoder, torch.zeros(2, 999, dtype=torch.long)).shape == (1, 128)


def test_the_distance_counts_nan_and_infinity_as_what_they_are():
    nan, inf = float("nan"), float("inf")
    one = torch.tensor([1.0, nan, inf])
    assert distance(one, one.clone()) == 0 and distance(torch.zeros(3), torch.zeros(3)) == 0
    limit = tolerance(torch.bfloat16)
    assert distance(torch.tensor([1.0 + 1e-7, nan, inf]), one) < tolerance(torch.float32)
    for other in [1.0, 1.0, inf], [1.0, nan, 1.0], [1.0, nan, -inf], [1.1, nan, inf], [nan, nan, inf]:
        assert not distance(torch.tensor(other), one) <= limit
    assert not distance(torch.ones(3), torch.zeros(3)) <= limit


# The command lines


def test_a_run_tells_the_time_of_the_check_and_what_to_do_when_it_fails(
    arguments, damaged, tmp_path, monkeypatch, capsys
):
    assert run(*arguments, "--save_model", tmp_path / "one", monkeypatch=monkeypatch) == 0
    seconds = json.loads((tmp_path / "run/result.json").read_text())["seconds"]
    assert seconds["check"] > 0 and seconds["save"] > 0
    damaged(damage_weights)
    again = [*arguments, "--overwrite", "--save_model", tmp_path / "two"]
    assert run(*again, "--eval_ppl", "no", monkeypatch=monkeypatch) == 1
    told = capsys.readouterr().err
    advice = f"--apply_plan {tmp_path / 'run/result.json'} --save_format masked"
    assert told.startswith("ppllms.py: failed: --save_format hf: the saved model would not be the measured one: ")
    assert advice in told and told.count("\n") == 1 and not (tmp_path / "two").exists()
    monkeypatch.undo()
    flags = [*arguments[:2], *advice.split(), "--save_model", tmp_path / "two", "--output_dir", tmp_path / "other"]
    assert run(*flags, "--eval_ppl", "no", monkeypatch=monkeypatch) == 0
    assert (tmp_path / "two/config.json").exists()


def test_alp_prune_checks_what_it_saves(alp_arguments, damaged, tmp_path, monkeypatch, capsys):
    flags = [*alp_arguments, "--prune_method", "magnitude", "--save_model", tmp_path / "out"]
    damaged(change_config)
    assert run_alp(*flags, monkeypatch=monkeypatch) == 1
    told = capsys.readouterr().err
    assert f"--save_model {tmp_path / 'out'}: the saved model would not be the measured one" in told
    assert told.count("\n") == 1 and not (tmp_path / "out").exists()


# Families whose layers are not alike


@pytest.fixture
def checkpoint(tmp_path, demo_tokenizer):
    """Makes a tiny checkpoint of a config class of transformers."""

    def make(name: str, **fields) -> Path:
        common = dict(vocab_size=len(demo_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4)
        common |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
        common |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), demo_tokenizer.eos_token_id)
        torch.manual_seed(0)
        config = getattr(transformers, name)(**{**common, **fields})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        demo_tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


GEMMA4 = dict(head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0, sliding_window=6)
GEMMA4 |= dict(layer_types=["sliding_attention", "full_attention"] * 2)
DENSE_FIRST = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1)
DENSE_FIRST |= dict(kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8)
DENSE_FIRST |= dict(num_key_value_heads=4, n_shared_experts=1)
BY_INDEX = dict(n_inner=48, scale_attn_by_inverse_layer_idx=True)


@pytest.mark.parametrize(
    ("name", "fields"), [("Gemma4TextConfig", GEMMA4), ("DeepseekV2Config", DENSE_FIRST), ("GPT2Config", BY_INDEX)]
)
@pytest.mark.parametrize("save_format", ["hf", "masked"])
def test_families_whose_layers_are_not_alike_are_saved_whatever_the_search_finds(
    name, fields, save_format, checkpoint, arguments, text_file, tmp_path, monkeypatch
):
    flags = [*arguments, "--model_name", checkpoint(name, **fields), "--save_model", tmp_path / "out"]
    assert run(*flags, "--save_format", save_format, monkeypatch=monkeypatch) == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokenizer = load_tokenizer(ModelSource(str(tmp_path / "out")))
    windows = evaluation_windows(load_corpus(str(text_file), "test"), tokenizer, 64)
    result = json.loads((tmp_path / "run/result.json").read_text())
    found = perplexity(reference.model_window_losses(saved), windows).value
    assert found == pytest.approx(result["perplexity"][str(text_file)]["pruned"], rel=1e-5)


def test_what_a_search_could_not_save_is_refused_before_it(checkpoint, arguments, tmp_path, monkeypatch, capsys):
    def refuse(model) -> None:
        raise SaveError("a reload would fail (because)")

    flags = [*arguments, "--model_name", checkpoint("LlamaConfig"), "--save_model", tmp_path / "out"]
    monkeypatch.setattr(lib.export.huggingface, "_check_rebuilt", refuse)
    assert run(*flags, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    reason = r"a reload would fail \(because\), if layer 0 loses attention and FFN; use --save_format masked, or .*"
    assert re.fullmatch(rf"ppllms.py: error: --save_format hf: {reason}\n", told), told
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="needs transformers 5.24 or newer")
def test_a_config_that_lists_sublayers_is_cut_to_the_layers_that_stay(checkpoint, arguments, monkeypatch, capsys):
    """Such a model is refused, but for what it is, which is looked at after the config."""
    fields = dict(n_input_layers=1, n_output_layers=1, head_dim=8)
    flags = [*arguments, "--model_name", checkpoint("DoryConfig", **fields), "--save_model", "out"]
    assert run(*flags, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"ppllms.py: error: .* scales or normalizes the residual stream, .*\n", told), told


def test_what_a_family_keeps_for_single_layers_goes_with_them(checkpoint, tmp_path, monkeypatch, capsys):
    folder = checkpoint("Gemma4TextConfig", **GEMMA4)
    total = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    parts = {"tool": "ppllms", "num_layers": 4, "model": str(folder), "parameters": {"total": total}}
    flags = ["--apply_plan", tmp_path / "result.json", "--eval_ppl", "no", "--output_dir", tmp_path / "run"]
    flags += ["--save_model", tmp_path / "out"]
    (tmp_path / "result.json").write_text(json.dumps(parts | {"mha_removed": [2], "ffn_removed": [2, 3]}))
    assert run(*flags, monkeypatch=monkeypatch) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["per_layer_config"] == {"1": {"head_dim": 16}, "2": {"head_dim": 16}}
    assert config["skip_sublayers"] == {"2": ["mlp"]}
    assert run(*flags, "--save_format", "nemotron-nas", "--overwrite", monkeypatch=monkeypatch) == 2
    assert "all layers must be alike, and the config has head_dim for single ones" in capsys.readouterr().err


# Quantized checkpoints


def write_quantized(folder: Path, weights: dict[str, torch.Tensor], **quantization) -> None:
    """Replaces the weights of a checkpoint by quantized ones."""
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


def quantize_fp8(folder: Path, block: int = 16) -> None:
    """Makes the weights of a checkpoint's linears FP8, with a scale for each block."""
    found = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not re.search(r"_proj\.|\.w\d\.", name):
            found[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.float().view(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        found[name] = (blocks / scale).reshape(rows, columns).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale.squeeze(3).squeeze(1).contiguous()
    write_quantized(folder, found, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[block, block])


@torch.no_grad()
@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_an_fp8_checkpoint_is_saved_with_dense_weights(family, offload, tmp_path):
    dense, ids = tiny_model(family).to(torch.bfloat16), tiny_windows(1)
    dense.save_pretrained(tmp_path / "fp8")
    names = set(load_file(tmp_path / "fp8/model.safetensors"))
    quantize_fp8(tmp_path / "fp8")

    def load() -> Decoder:
        return Decoder(load_model(ModelSource(str(tmp_path / "fp8"), offload=offload)))

    save_weights(load(), None, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert set(tensors) == names and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    expected = dense(input_ids=ids).logits.float()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits.float()
    assert (found - expected).norm() < 0.2 * expected.norm()
    for save_format in FORMATS[: 3 if family == "Llama" else 2]:
        save_pruned(load(), MIXED, None, tmp_path / save_format, save_format)


_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def quantize_mxfp4(folder: Path) -> None:
    """Makes the experts of a GPT-OSS MXFP4, as it is published: 32 numbers of 4 bits with one power of two."""
    found = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not re.search(r"experts\.\w+_proj$", name):
            found[name] = weight
            continue
        groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
        exponent = groups.abs().amax(3).log2().floor() - 2
        codes = (groups / exponent.exp2()[..., None] - _FP4.view(-1, 1, 1, 1, 1)).abs().argmin(0).to(torch.uint8)
        found[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).contiguous()
        found[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    write_quantized(folder, found, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_mxfp4_experts_as_gpt_oss_has_them_become_dense(dtype, offload, tmp_path):
    dense = tiny_model("GptOss", hidden_size=64, intermediate_size=64).to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "mxfp4")
    quantize_mxfp4(tmp_path / "mxfp4")

    def load() -> Decoder:
        return Decoder(load_model(ModelSource(str(tmp_path / "mxfp4"), dtype, offload=offload)))

    save_weights(load(), None, tmp_path / "out")
    tensors, given = load_file(tmp_path / "out/model.safetensors"), dense.state_dict()
    expected_dtype = torch.bfloat16 if dtype == "auto" else torch.float32
    assert tensors.keys() == given.keys() and {tensor.dtype for tensor in tensors.values()} == {expected_dtype}
    for name, weight in given.items():
        distance = (tensors[name].float() - weight.float()).norm() / weight.float().norm()
        assert 0.02 < distance < 0.2 if name.endswith("experts.down_proj") else distance < 0.2, name
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    plan = Plan(dense.config.num_hidden_layers, (1,), (1,))
    save_pruned(load(), plan, None, tmp_path / "pruned")


def test_fp8_in_another_dtype_and_other_quantized_weights_are_refused_before_work(
    arguments, tiny_folder, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    quantize_fp8(folder)
    with pytest.raises(InputError, match="^--dtype bfloat16: the FP8 weights of .* load as float32; leave "):
        load_config(ModelSource(str(folder), "bfloat16"))
    path = folder / "config.json"
    for method in "gptq", "awq", "bitsandbytes", "compressed-tensors", None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
        assert run(*arguments, "--model_name", folder, monkeypatch=monkeypatch) == 2
        told = capsys.readouterr().err
        assert f"{folder}: is quantized ({method}), and pruning needs dense weights" in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()
