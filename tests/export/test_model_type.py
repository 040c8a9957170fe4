"""A folder with removed sublayers has a model type of its own, so that what does not know it refuses to load it."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from lib.config.plan import Plan
from lib.config.sources import ModelSource
from lib.errors import InputError
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from lib.models.loading import load_config, load_model, load_outline, load_tokenizer
from lib.models.modeling_pruned import skip_lists
from tests.families import FAMILIES, tiny_model, tiny_windows

MIXED = Plan(4, mha_removed=(0, 2), ffn_removed=(1, 2))
CODE_IS_ASKED_FOR = "trust_remote_code=True"


@pytest.fixture
def folder(tmp_path, demo_tokenizer):
    model = tiny_model("Llama", vocab_size=len(demo_tokenizer))
    save_pruned(Decoder(model), MIXED, demo_tokenizer, tmp_path / "out")
    return tmp_path / "out"


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def without(config, *names):
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", *names)}


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM])
def test_transformers_refuses_it_without_its_code(auto, folder):
    for options in {}, {"trust_remote_code": False}:
        with pytest.raises(ValueError, match=CODE_IS_ASKED_FOR):
            auto.from_pretrained(folder, **options)


def test_a_pipeline_refuses_it_without_its_code_and_runs_with_it(folder):
    with pytest.raises(ValueError, match=CODE_IS_ASKED_FOR):
        transformers.pipeline("text-generation", str(folder), trust_remote_code=False)
    pipeline = transformers.pipeline("text-generation", str(folder), trust_remote_code=True)
    assert pipeline("The layer", max_new_tokens=4)[0]["generated_text"].startswith("The layer")


def test_lm_eval_refuses_it_without_its_code(folder):
    models = pytest.importorskip("lm_eval.models.huggingface")
    with pytest.raises(ValueError, match=CODE_IS_ASKED_FOR):
        models.HFLM(pretrained=str(folder), device="cpu")


def test_peft_does_not_guess_target_modules(folder):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


@pytest.mark.parametrize("family", FAMILIES)
def test_its_config_is_that_of_the_stock_class_in_all_but_type(family, tmp_path):
    model = tiny_model(family)
    stock, kind = type(model.config), model.config.model_type
    save_pruned(Decoder(model), MIXED, None, tmp_path / "one")
    config = AutoConfig.from_pretrained(tmp_path / "one", trust_remote_code=True)
    assert isinstance(config, stock) and type(config).__name__ == f"Pruned{stock.__name__}"
    assert config.model_type == f"pruned_{kind}"
    ours = load_config(ModelSource(str(tmp_path / "one")))
    assert type(ours) is stock and ours.model_type == kind
    assert without(config, "auto_map", "model_type") == without(ours, "model_type")
    config.save_pretrained(tmp_path / "two")
    again = AutoConfig.from_pretrained(tmp_path / "two", trust_remote_code=True)
    assert without(again) == without(config) and skip_lists(again) == [["attention"], ["mlp"], []]


def test_the_tokenizer_needs_no_code(folder, demo_tokenizer):
    text = "The layer was removed"
    for tokenizer in AutoTokenizer.from_pretrained(folder), load_tokenizer(ModelSource(str(folder))):
        assert type(tokenizer) is type(demo_tokenizer) and tokenizer(text).input_ids == demo_tokenizer(text).input_ids


def test_our_scripts_run_none_of_its_code(folder):
    (folder / "modeling_pruned.py").write_text("raise SystemExit('was run')")
    for trust in False, True:
        source = ModelSource(str(folder), trust_remote_code=trust)
        load_tokenizer(source)
        assert type(load_outline(load_config(source), trust)) is type(load_model(source))


@torch.no_grad()
def test_folders_of_the_earlier_form_still_load(tmp_path):
    save_pruned(Decoder(tiny_model("Llama")), MIXED, None, tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)(tiny_windows(1)).logits
    change(tmp_path, model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM"})
    for model in (
        load_model(ModelSource(str(tmp_path))),
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert torch.equal(model(tiny_windows(1)).logits, expected)
    save_pruned(Decoder(load_model(ModelSource(str(tmp_path)))), Plan(3), None, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["model_type"] == "pruned_llama"


@pytest.mark.parametrize("skip", [["ffn"], ["foo", "mlp"], ["mlp", "Attention"]])
def test_an_unknown_word_in_skip_is_refused_by_us_and_by_the_file_that_travels(skip, folder):
    change(folder, per_layer_config={"0": {"skip": skip}})
    for load in load_config, load_tokenizer, load_model:
        with pytest.raises(InputError, match="cannot skip .*; known are attention and mlp") as told:
            load(ModelSource(str(folder)))
        assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="cannot skip"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_skip_lists_are_read_without_transformers_support_for_the_key():
    class Config:
        num_hidden_layers = 3
        per_layer_config = {"02": {"skip": ["mlp"]}, 0: {"head_dim": 4}}

    assert skip_lists(Config) == [[], [], ["mlp"]]


def test_a_fresh_process_loads_it_with_its_code_alone(folder):
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A\n"
        "model = A.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model).__name__, 'lib' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code, folder], cwd=folder.parent, capture_output=True, text=True)
    assert found.stdout.split() == ["PrunedLlamaForCausalLM", "False"], found.stderr


def test_the_installed_transformers_does_not_read_what_layers_skip_itself(folder):
    """Its pull request 45332 would. When this fails, its own reading can take the place of the code in the folder."""
    given = json.loads((folder / "config.json").read_text())
    config = transformers.LlamaConfig(**{name: given[name] for name in ("num_hidden_layers", "per_layer_config")})
    assert skip_lists(config) == [["attention"], ["mlp"], []]
    with torch.device("meta"):
        layers = transformers.LlamaForCausalLM(config).model.layers
    assert all(type(layer.self_attn).__name__ == "LlamaAttention" for layer in layers)
    assert all(type(layer.mlp).__name__ == "LlamaMLP" for layer in layers)
