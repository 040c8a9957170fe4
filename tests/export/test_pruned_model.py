"""What people do with a model in transformers works with a pruned one: devices, caches, training, adapters, tasks."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.config.plan import Plan
from lib.config.sources import ModelSource
from lib.engine.own_text import cache_name
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from lib.models.loading import load_model, load_tokenizer
from tests.families import FAMILIES, tiny_model, tiny_windows

MIXED = Plan(4, mha_removed=(0, 2), ffn_removed=(1, 2))  # layer 0 without attention, 1 without FFN, 2 gone
CACHED = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "OPT", "GPTNeoX", "Falcon", "Mixtral"]


@pytest.fixture
def pruned(tmp_path):
    """Makes a folder of a family's tiny model under the mixed plan."""

    def make(family):
        save_pruned(Decoder(tiny_model(family)), MIXED, None, tmp_path / "pruned")
        return tmp_path / "pruned"

    return make


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("save_format", ["hf", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_precision_model_reloads_as_it_was(family, save_format, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "dense")
    decoder, ids = Decoder(load_model(ModelSource(str(tmp_path / "dense"), "bfloat16"))), tiny_windows(2)
    decoder.apply(MIXED)
    expected = decoder.model(input_ids=ids, use_cache=False).logits
    save_pruned(decoder, MIXED, None, tmp_path / "out", save_format)
    reloaded = load(tmp_path / "out")
    assert reloaded.dtype == torch.bfloat16 and reloaded.config.dtype == torch.bfloat16
    assert torch.equal(reloaded(input_ids=ids, use_cache=False).logits, expected)
    assert load(tmp_path / "out", dtype=torch.float32).dtype == torch.float32
    assert load(tmp_path / "out", torch_dtype=torch.float16).dtype == torch.float16


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "LlamaTied", "Gemma3", "Falcon"])
def test_a_device_map_places_it(family, pruned):
    folder, ids = pruned(family), tiny_windows(2)
    expected = load(folder)(input_ids=ids).logits
    for device_map in "auto", "cpu", {"": "cpu"}:
        placed = load(folder, device_map=device_map)
        assert torch.equal(placed(input_ids=ids).logits, expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_a_device_map_offloads_it(pruned, tmp_path):
    folder, ids = pruned("Llama"), tiny_windows(2)
    expected = load(folder)(input_ids=ids).logits
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "cpu" if layer else "disk" for layer in range(3)}
    placed = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(placed(input_ids=ids).logits, expected)
    placed.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(input_ids=ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", CACHED)
def test_padded_batches_generate_with_every_cache_what_their_rows_do_without(family, cache, pruned):
    model, ids = load(pruned(family)), tiny_windows(2, 8)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    short, long = ids[:1, :4], ids[1:]
    alone = [model.generate(i, attention_mask=torch.ones_like(i), use_cache=False, **options) for i in (short, long)]
    mask = torch.tensor([[0] * 4 + [1] * 4, [1] * 8])
    batch = torch.cat([torch.cat([torch.zeros_like(short), short], dim=1), long])
    found = model.generate(batch, attention_mask=mask, cache_implementation=cache, **options)
    assert torch.equal(found[0, 8:], alone[0][0, 4:])
    assert torch.equal(found[1, 8:], alone[1][0, 8:])


def test_removed_layers_have_no_key_value_cache(pruned):
    model, ids = load(pruned("Llama")), tiny_windows(2, 8)
    cache = getattr(model(input_ids=ids, use_cache=True), cache_name(model))
    assert cache.get_seq_length() == 8
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None and layer.keys.numel()]
    assert len(held) == 2  # three layers, one of them without attention


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "OPT", "GPTNeoX", "Falcon", "GPT2"])
def test_it_trains_and_gradient_checkpointing_changes_no_gradient(family, pruned):
    folder, ids, gradients = pruned(family), tiny_windows(2), []
    for checkpointing in False, True:
        model = load(folder).train()
        for module in model.modules():  # random masks would differ
            for name in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and any(gradient.abs().max() > 0 for gradient in plain.values())
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_lora_adapters_train_save_and_load_on_it(pruned, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    folder, ids = pruned("Llama"), tiny_windows(4)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(folder), config)
    losses, optimizer = [], torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
        assert torch.allclose(again(input_ids=ids).logits, expected, atol=1e-6)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert torch.allclose(load(tmp_path / "merged")(input_ids=ids).logits, expected, atol=1e-4)


def test_lm_eval_takes_it_by_the_name_of_its_folder(tmp_path, text_file):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    source, rows = ModelSource("demo"), tmp_path / "rows.jsonl"
    tokenizer = load_tokenizer(source)
    save_pruned(Decoder(load_model(source)), Plan(12, (6,), (4, 6)), tokenizer, tmp_path / "out")
    rows.write_text("".join(json.dumps({"page": text_file.read_text()[i : i + 400]}) + "\n" for i in (0, 900)))
    task = {"task": "pages", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    task |= {"output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": ""}
    task |= {"doc_to_target": "{{page}}", "metric_list": [{"metric": "word_perplexity"}]}
    arguments = f"pretrained={tmp_path / 'out'},trust_remote_code=True"
    options = {"tasks": [task], "bootstrap_iters": 0, "task_manager": TaskManager(include_defaults=False)}
    with_folder = lm_eval.simple_evaluate(model="hf", model_args=arguments, device="cpu", **options)
    model = load_model(ModelSource(str(tmp_path / "out")))
    in_memory = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer)
    with_model = lm_eval.simple_evaluate(model=in_memory, **options)
    found, expected = (r["results"]["pages"]["word_perplexity,none"] for r in (with_folder, with_model))
    assert found == pytest.approx(expected) and found > 1
