"""The bundled model is what the README says: small, well trained for its size, and pruned like a real one."""

import json
import sys

import pytest

import ppllms
from lib.cli.exit_status import run_script
from lib.config.plan import Plan
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import calibration_windows, evaluation_windows
from lib.demo import DEMO_MODEL
from lib.depth.block_influence import block_influence
from lib.engine.window_scores import plan_window_losses
from lib.evaluation.perplexity import perplexity
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from lib.runtime.batching import Batcher


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(load_model(ModelSource("demo")))


def test_the_demo_is_small_and_shaped_like_a_real_llama(decoder):
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) <= 12e6
    attention, ffn = decoder.sublayer_parameters(0)
    assert decoder.num_layers >= 10 and 1.8 < ffn / attention < 2.2


def test_removing_layers_of_low_influence_hurts_far_less(decoder, demo_tokenizer):
    windows = calibration_windows(load_corpus("demo", "train"), demo_tokenizer, 16, 256, seed=0)
    held_out = evaluation_windows(load_corpus("demo", "test"), demo_tokenizer, 256)[:32]
    batcher, layers = Batcher(4), decoder.num_layers
    ranked = sorted(range(layers), key=block_influence(decoder, windows, batcher).__getitem__)

    def measure(removed: list[int]) -> float:
        plan = Plan(layers, tuple(removed), tuple(removed))
        return perplexity(plan_window_losses(decoder, plan, batcher), held_out).value

    dense, low, high = measure([]), measure(ranked[:2]), measure(ranked[-2:])
    assert dense < 60  # a unigram model reaches about 560
    assert low < 2.5 * dense
    assert high > 5 * low


def test_the_default_run_prunes_the_demo(tmp_path, monkeypatch):
    flags = ["--output_dir", str(tmp_path / "run"), "--nsamples", "16", "--eval_ppl", "no"]
    monkeypatch.setattr(sys, "argv", ["ppllms.py", *flags])
    assert run_script("ppllms.py", ppllms.main) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["dataset"] == "demo" and len(result["mha_removed"]) == 2 and len(result["ffn_removed"]) == 4
    assert result["parameters"]["actual_rate"] == pytest.approx(0.25, abs=0.02)
