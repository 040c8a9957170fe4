"""Every decoder of transformers goes through both commands, and comes out as it was measured or is refused."""

import pytest

from tests.census import PAGE, Census, cells, families

# In the default run: of each form of layer, what people use most.
SAMPLE = """llama qwen3 gemma3_text gemma4_text gpt_oss qwen3_moe mixtral deepseek_v2 deepseek_v3 glm4_moe ernie4_5_moe
minimax_m2 qwen3_next qwen3_5_text llama4_text jamba bamba falcon_h1 nemotron_h granitemoehybrid lfm2_moe kimi_linear
mamba olmo_hybrid jetmoe gpt2 bloom phimoe diffllama minicpm3""".split()


@pytest.fixture(scope="module")
def census(tmp_path_factory, demo_tokenizer) -> Census:
    return Census(tmp_path_factory.mktemp("census"), demo_tokenizer)


@pytest.mark.parametrize(
    "model_type", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in families()]
)
def test_a_family_comes_out_of_both_commands_as_it_was_measured_or_is_refused(model_type: str, census: Census):
    """`Census` holds saved models against transformers; what came of the commands must stand on the page."""
    page = PAGE.read_text(encoding="utf-8")
    try:
        model = census.build(model_type)
    except Exception:  # whatever a configuration or a model raises
        assert f"`{model_type}`" in page.partition("- Not built")[2]
        return
    depth, sparsity = census.depth(model), census.sparsity(model)
    row = next((line for line in page.splitlines() if f"| `{model_type}` |" in line), None)
    if row is None:
        assert depth.refusal == sparsity.refusal and f"`{model_type}`" in page.partition("## Not decoders")[2]
    else:
        assert row.endswith(f"| {cells(depth, sparsity)} |")
