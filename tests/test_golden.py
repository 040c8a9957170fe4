"""PP-LLMs on a real trained model and real text gives what the reference code gives."""

import json
import sys

import pytest

import ppllms
from lib import cli


@pytest.mark.parametrize("run", [0, 1], ids=["2of3", "1of2"])
def test_ppllms_is_the_reference(shared, tmp_path, monkeypatch, run):
    golden = json.loads((shared / "golden/ppllms.json").read_text())
    expected, c4 = golden["runs"][run], str(shared / "data/c4")
    flags = {
        "--model_name": shared / "models/stories260K",
        "--dtype": golden["dtype"],
        "--dataset": c4,
        "--eval_datasets": c4,
        "--seqlen": golden["seqlen"],
        "--bi_windows": 1,
        "--output_dir": tmp_path / "run",
        **{f"--{name}": expected[name] for name in ("nsamples", "seed", "mha_remove_layers", "ffn_remove_layers")},
    }
    monkeypatch.setattr(sys, "argv", ["ppllms.py", *(str(part) for flag in flags.items() for part in flag)])
    assert cli.run("ppllms.py", ppllms.main) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())

    assert result["bi_scores"] == pytest.approx(expected["bi_scores_first_window"], abs=1e-4)
    assert result["candidates"] == expected["candidates"]
    for found, wanted in zip(result["rounds"], expected["rounds"], strict=True):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert found["selected"] == wanted["selected"]
    assert result["mha_removed"] == expected["mha_removed"]
    assert result["ffn_removed"] == expected["ffn_removed"]
    assert result["perplexity"][c4]["pruned"] == pytest.approx(expected["ppl_c4"], rel=1e-4)
    dense = json.loads((shared / "golden/weight_pruning.json").read_text())["dense"]["ppl_c4"]
    assert result["perplexity"][c4]["dense"] == pytest.approx(dense, rel=1e-4)
