"""The decoder view agrees with the model's own forward, and refuses what does not fit."""

import pytest
import torch
import transformers

from lib.config.plan import Mode, Plan
from lib.engine.finite import final_hidden_states
from lib.engine.own_text import cache_name
from lib.errors import InputError
from lib.models.decoder import Decoder
from tests.families import FAMILIES, tiny_model, tiny_windows
from tests.reference import toggled

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_streamed_logits_are_the_models_own(family):
    model, ids = tiny_model(family), tiny_windows(3)
    decoder = Decoder(model)
    streamed = decoder.logits(final_hidden_states(decoder, ids, Plan(4).modes))
    assert torch.equal(streamed, model(input_ids=ids).logits)


@every_family
def test_a_plan_gives_what_removing_the_modules_gives(family):
    model, ids, plan = tiny_model(family), tiny_windows(2), Plan(4, mha_removed=(2, 0), ffn_removed=(1, 2))
    expected = toggled(model, plan.mha_removed, plan.ffn_removed)(input_ids=ids, use_cache=False).logits
    decoder = Decoder(model)
    streamed = decoder.logits(final_hidden_states(decoder, ids, plan.modes))
    decoder.apply(plan)
    assert torch.equal(streamed, expected)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


@every_family
def test_the_number_of_layers_does_not_matter(family):
    """What layers return, and what the model makes of that on its way up, differs from family to family."""
    types = FAMILIES[family][1].get("layer_types")
    more = {"layer_types": [*types, *types[:3]]} if types else {}
    model, ids = tiny_model(family, num_hidden_layers=7, **more), tiny_windows(1)
    decoder = Decoder(model)
    streamed = decoder.logits(final_hidden_states(decoder, ids, Plan(7).modes))
    assert torch.equal(streamed, model(input_ids=ids, use_cache=False).logits)


@every_family
def test_switching_back_on_restores_the_model(family):
    model, ids = tiny_model(family), tiny_windows(1)
    dense = model(input_ids=ids).logits
    decoder = Decoder(model)
    decoder.apply(Plan(4, mha_removed=(0, 1, 3), ffn_removed=(0, 1, 2)))
    assert (model(input_ids=ids, use_cache=False).logits - dense).abs().max() > 0.01
    decoder.apply(Plan(4))
    assert torch.equal(model(input_ids=ids).logits, dense)


@every_family
@pytest.mark.parametrize("plan", [Plan(4, (0,), (1,)), Plan(4, (0, 2), (2, 3)), Plan(4, (3, 1), (0, 1))], ids=str)
def test_under_a_plan_the_model_generates_with_its_cache_as_without_and_then_is_dense_again(family, plan):
    model, ids = tiny_model(family), tiny_windows(2, 10)
    decoder, mask = Decoder(model), torch.ones_like(ids)
    mask[0, :6] = 0  # on the left, as prompts of different lengths are batched

    def logits(uses_cache: bool = True) -> torch.Tensor:  # of 8 tokens after the window
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": uses_cache}
        options |= {"attention_mask": mask}
        return torch.stack(model.generate(ids, output_logits=True, return_dict_in_generate=True, **options).logits)

    numbers = [getattr(module, "layer_idx", None) for module in decoder.layers.modules()]
    types, dense = getattr(decoder.config, "layer_types", None), logits()
    with decoder.under(plan):
        expected = logits(uses_cache=False)
        torch.testing.assert_close(logits(), expected, rtol=1e-3, atol=1e-3)
        name, whole = cache_name(model), model(ids, use_cache=False).logits
        found = model(ids[:, 6:], **{name: getattr(model(ids[:, :6], use_cache=True), name)}).logits
        torch.testing.assert_close(found, whole[:, 6:], rtol=1e-3, atol=1e-3)
    assert (expected - dense).abs().max() > 0.01
    assert [getattr(module, "layer_idx", None) for module in decoder.layers.modules()] == numbers
    assert getattr(decoder.config, "layer_types", None) == types and torch.equal(logits(), dense)


@every_family
def test_parameters_are_counted_once_and_whatever_is_switched_off(family):
    model = tiny_model(family)
    total = sum(parameter.numel() for parameter in model.parameters())
    decoder = Decoder(model)
    decoder.apply(Plan(4, mha_removed=(0, 1), ffn_removed=(0, 2)))
    assert decoder.total_parameters == total
    attention, ffn = decoder.sublayer_parameters(3)
    assert 0 < attention < total and 0 < ffn < total
    whole = sum(parameter.numel() for parameter in decoder.layers[3].parameters())
    assert decoder.removed_parameters(Plan(4, (3,), (3,))) == whole >= attention + ffn
    assert decoder.removed_parameters(Plan(4, (3,), ())) == attention
    assert decoder.removed_parameters(Plan(4, (), (3,))) == ffn


def test_llama_counts_are_those_of_its_matrices():
    assert Decoder(tiny_model("Llama")).sublayer_parameters(0) == (32 * (32 + 16 + 16 + 32), 3 * 32 * 48)


def test_a_model_without_weights_can_be_counted():
    model = tiny_model("Mixtral")
    with torch.device("meta"):
        outline = transformers.AutoModelForCausalLM.from_config(model.config)
    counted, decoder = Decoder(outline, has_weights=False), Decoder(model)
    assert counted.total_parameters == decoder.total_parameters
    assert counted.sublayer_parameters(0) == decoder.sublayer_parameters(0)


_SIZE = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize(
    "config, reason",
    [
        (transformers.DogeConfig(**_SIZE, intermediate_size=48), "scales or normalizes the residual stream"),
        (
            transformers.OPTConfig(**_SIZE, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False),
            "scales or normalizes the residual stream",
        ),
        (transformers.BertConfig(**_SIZE, intermediate_size=48, is_decoder=True), "is an encoder"),
        (
            transformers.MBartConfig(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2),
            "one half of an encoder-decoder",
        ),
        (
            transformers.Gemma3nTextConfig(
                **_SIZE, intermediate_size=48, num_kv_shared_layers=1, layer_types=["full_attention"] * 2
            ),
            "pass on several hidden states for each token",
        ),
    ],
    ids=["doge", "opt-post-norm", "bert", "mbart", "gemma3n"],
)
def test_what_does_not_fit_is_refused_by_name_with_the_reason(config, reason):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.get_input_embeddings().weight.data[0] = 0  # as of a token that pads
    with pytest.raises(InputError, match=reason) as error:
        Decoder(model)
    assert type(model).__name__ in str(error.value)


def test_what_a_skipped_module_returns_is_what_it_returned():
    """GPT-OSS's experts return router scores too, the state space of Falcon-H1 no attention weights."""
    for family, kind, number in (("GptOss", "mlp", 2), ("FalconH1", "attention", None), ("Llama", "attention", 2)):
        decoder = Decoder(tiny_model(family))
        decoder.set_mode(1, Mode(attention=kind != "attention", ffn=kind != "mlp"))
        found = {name: getattr(decoder.layers[1], name).num_values for name in decoder.sublayers[1][kind]}
        assert found == ({"mamba": 1, "self_attn": 2} if number is None else dict.fromkeys(found, number))


def test_a_layer_with_one_sublayer_is_removed_with_it():
    decoder = Decoder(tiny_model("NemotronH"))
    assert decoder.made_modes == [Mode(ffn=False), Mode(ffn=False), Mode(attention=False), Mode(ffn=False)]
    assert decoder.whole_layers == [0, 1, 2, 3] and not decoder.paired_layers
    plan = decoder.complete(Plan(4, (0,), (2,)))
    assert plan.kept_layers == [1, 3]
    whole = sum(parameter.numel() for index in (0, 2) for parameter in decoder.layers[index].parameters())
    assert decoder.removed_parameters(plan) == whole


def test_a_plan_names_layers_that_exist_once():
    with pytest.raises(ValueError, match="below 4"):
        Plan(4, mha_removed=(4,))
    with pytest.raises(ValueError, match="different"):
        Plan(4, ffn_removed=(1, 1))


@pytest.mark.parametrize("family, window", [("Llama", None), ("Mixtral", None), ("Mistral", 16), ("Mistral", 4)])
def test_a_dense_mask_is_made_only_for_a_sliding_window_that_is_shorter_than_the_text(family, window):
    decoder = Decoder(tiny_model(family, **({"sliding_window": window} if window else {})))
    _, inputs = decoder.embed(torch.zeros(2, 8, dtype=torch.long))
    masks = [of_layer["attention_mask"] for of_layer in inputs.kwargs]
    assert all((mask is None) == (window != 4) for mask in masks), "with None, flash attention can run"
