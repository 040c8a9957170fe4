"""A key has everything that a result depends on: every flag is in it, or on the list of those that change no result."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lib.config.keys
import lib.runs.single
import lib.sensitivity.run
from lib.config.keys import WITHOUT_EFFECT, code_digest
from lib.config.snapshot import Snapshot
from lib.errors import InputError
from tests.command import ROOT, run

SCRIPTS = ("ppllms", "alp_prune", "save_gradient", "heal")
MODULES = {name: importlib.import_module(name if name != "heal" else "lib.heal.__main__") for name in SCRIPTS}
OUTPUT = ["--overwrite", "--output_dir", "{tmp}/run"]
OWN_CODE = "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"

# {script: {flag: (flags of both runs, flags of the second)}}
CHANGES: dict[str, dict[str, tuple[list, list]]] = {
    "ppllms": {
        "model_name": ([], ["--model_name", "{model}"]),
        "method": ([], ["--method", "sleb"]),
        "prune_rate": ([], ["--prune_rate", 0.1]),
        "mha_remove_layers": ([], ["--mha_remove_layers", 1]),
        "ffn_remove_layers": ([], ["--ffn_remove_layers", 2]),
        "mha_ffn_ratio": ([], ["--mha_ffn_ratio", 1]),
        "beam_width": (["--method", "beam"], ["--beam_width", 2]),
        "nsamples": ([], ["--nsamples", 4]),
        "dataset": (["--dataset", "{text}", "demo"], ["--dataset", "{text}:2", "demo:1"]),
        "bi_windows": ([], ["--bi_windows", 1]),
        "eval_ppl": ([], ["--eval_ppl", "no"]),
        "eval_datasets": ([], ["--eval_datasets", "{text}"]),
        "apply_plan": ([], ["--apply_plan", "{plan}"]),
        "compensate": ([], ["--compensate", "all"]),
        "compensate_dataset": (["--compensate", "all"], ["--compensate_dataset", "{text}"]),
        "compensate_nsamples": (["--compensate", "all"], ["--compensate_nsamples", 9]),
    },
    "alp_prune": {
        "model": ([], ["--model", "{model}"]),
        "prune_method": ([], ["--prune_method", "ria_alp"]),
        "sparsity_ratio": ([], ["--sparsity_ratio", 0.4]),
        "sparsity_type": ([], ["--sparsity_type", "2:4"]),
        "semi_structured": (["--sparsity_type", "2:4"], ["--semi_structured"]),
        "use_variant": ([], ["--use_variant"]),
        "a": (["--prune_method", "ria"], ["--a", 0.7]),
        "percdamp": (["--prune_method", "sparsegpt"], ["--percdamp", 0.1]),
        "alpha": ([], ["--alpha", 0.1]),
        "owl_m": (["--prune_method", "wanda_owl"], ["--owl_m", 3]),
        "grad_nsamples": ([], ["--grad_nsamples", 5]),
        "grad_seqlen": ([], ["--grad_seqlen", 20]),
        "grad_loss": ([], ["--grad_loss", "all"]),
        "grad_type": ([], ["--grad_type", "l1"]),
        "grad_seed": ([], ["--grad_seed", 1]),
        "gradients": ([], ["--gradients", "{plan}"]),
        "wbits": ([], ["--wbits", 4]),
        "gptq": (["--wbits", 4], ["--gptq"]),
        "sym": (["--wbits", 4], ["--sym"]),
        "groupsize": (["--wbits", 4], ["--groupsize", 16]),
        "act_order": (["--wbits", 4, "--gptq"], ["--act-order"]),
        "static_groups": (["--wbits", 4, "--gptq", "--groupsize", 16], ["--static-groups"]),
        "nsamples": ([], ["--nsamples", 4]),
        "calibration_dataset": ([], ["--calibration_dataset", "{text}"]),
        "dataset": ([], ["--dataset", "{text}"]),
        "eval_zero_shot": ([], ["--eval_zero_shot"]),
    },
    "save_gradient": {
        "model": ([], ["--model", "{model}"]),
        "dataset": ([], ["--dataset", "{text}"]),
        "seed": ([], ["--grad_seed", 1]),
        "ngrad": ([], ["--ngrad", 4]),
        "grad_seqlen": ([], ["--grad_seqlen", 20]),
        "grad_loss": ([], ["--grad_loss", "all"]),
        "grad_type": ([], ["--grad_type", "l1"]),
        "dtype": ([], ["--dtype", "bfloat16"]),
        "trust_remote_code": (["--model", "{code}"], ["--trust_remote_code"]),
    },
}
CHANGES["heal"] = {
    "model": ([], ["--model", "{model}"]),
    "teacher": ([], ["--teacher", "{model}"]),
    "dataset": ([], ["--dataset", "{text}"]),
    "nsamples": ([], ["--nsamples", 4]),
    "eval_datasets": ([], ["--eval_datasets", "{text}"]),
    "steps": ([], ["--steps", 4]),
    "train_batch_size": ([], ["--train_batch_size", 4]),
    "rank": ([], ["--rank", 4]),
    "learning_rate": ([], ["--learning_rate", 0.01]),
}
for _script in ("ppllms", "alp_prune", "heal"):
    CHANGES[_script] |= {
        "tasks": ([], ["--tasks", "rte"]),
        "seed": ([], ["--seed", 1]),
        "seqlen": ([], ["--seqlen", 32]),
        "eval_stride": ([], ["--eval_stride", 16]),
        "eval_windows": ([], ["--eval_windows", 2]),
        "prompts": ([], ["--prompts", "{text}"]),
        "dtype": ([], ["--dtype", "bfloat16"]),
        "trust_remote_code": ([], ["--trust_remote_code"]),
    }
_PLACES = {"device": ([], ["--device", "cpu"]), "device_map": ([], ["--device_map", "cpu"])}
_PLACES |= {"offload": ([], ["--offload", "cpu"])}
_SAME = {"batch_size": ([], ["--batch_size", 3]), "output_dir": ([], ["--output_dir", "{tmp}/other"])}
_SAME |= {"save_model": ([], ["--save_model", "{tmp}/out"]), "resume": ([], ["--resume"])}
SAME: dict[str, dict[str, tuple[list, list]]] = {
    "ppllms": {
        **_PLACES,
        **_SAME,
        "cache_dir": ([], ["--cache_dir", "{tmp}/cache"]),
        "save_format": (["--save_model", "{tmp}/out"], ["--save_format", "masked"]),
        "num_blocks": ([], ["--num_blocks", 4]),
    },
    "alp_prune": {
        **_PLACES,
        **_SAME,
        "cache_dir": ([], ["--cache_dir", "{tmp}/cache"]),
        "model_name": ([], ["--model_name", "other"]),
        "save": ([], ["--save", "{tmp}/logs"]),
        "save_log": ([], ["--save_log"]),
    },
    "heal": {
        "device": _PLACES["device"],
        "device_map": _PLACES["device_map"],
        **_SAME,
        "cache_dir": ([], ["--cache_dir", "{tmp}/cache"]),
        "save_format": (["--save_model", "{tmp}/out"], ["--save_format", "nemotron-nas"]),
    },
    "save_gradient": {
        **_PLACES,
        "cache_dir": ([], ["--cache_dir", "{tmp}/cache"]),
        "output": ([], ["--output", "{tmp}/other.json"]),
    },
}


@pytest.fixture
def key(tiny_folder, text_file, tmp_path, monkeypatch):
    """The key of a run of a script with these flags, which is not run."""
    paths = {name: tmp_path / name for name in ("model", "code")} | {"tmp": tmp_path, "plan": tmp_path / "plan.json"}
    paths["text"] = tmp_path / "other.txt"
    for name in ("model", "code"):
        shutil.copytree(tiny_folder, paths[name])
    config = json.loads((tiny_folder / "config.json").read_text())
    (paths["model"] / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    (paths["code"] / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    (paths["code"] / "own.py").write_text(OWN_CODE)
    paths["text"].write_text(text_file.read_text().upper())
    plan = {"tool": "ppllms", "model": str(tiny_folder), "num_layers": 4, "mha_removed": [1], "ffn_removed": [1, 2]}
    paths["plan"].write_text(json.dumps({**plan, "parameters": {"total": 162080}}))
    monkeypatch.chdir(tmp_path)
    base = {
        "ppllms": ["--model_name", tiny_folder, "--eval_datasets", text_file, *OUTPUT],
        "alp_prune": ["--model", tiny_folder, "--calibration_dataset", text_file, "--dataset", text_file, *OUTPUT],
        "save_gradient": ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 3, "--grad_seqlen", 16],
        "heal": ["--model", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, *OUTPUT],
    }

    def of(script: str, *flags) -> dict:
        found: list = []

        def stop(folder, key, *rest):
            found.append(key)
            raise InputError("that is enough")

        monkeypatch.setattr(lib.runs.single, "run_single", lambda kind, settings: found.append(settings))
        monkeypatch.setattr(lib.sensitivity.run, "State", stop)
        of_search = [] if "--apply_plan" in flags else ["--dataset", text_file]
        command = [*base[script], *(of_search if script == "ppllms" else []), *flags]
        command = [flag.format(**paths) if isinstance(flag, str) else flag for flag in command]
        status = run(*command, script=MODULES[script], monkeypatch=monkeypatch)
        assert len(found) == 1 and status == (2 if script == "save_gradient" else 0)
        if script == "save_gradient":
            return found[0]
        return replace(found[0], snapshot=Snapshot.take(found[0].inputs)).key

    return of


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_key_or_on_the_list_of_those_that_change_no_result(script):
    flags = {action.dest for action in MODULES[script].build_parser()._actions} - {"help", "version"}
    assert flags == CHANGES[script].keys() | WITHOUT_EFFECT[script].keys()
    assert not CHANGES[script].keys() & WITHOUT_EFFECT[script].keys()
    assert all(reason for reason in WITHOUT_EFFECT[script].values())
    assert SAME[script].keys() <= WITHOUT_EFFECT[script].keys()


@pytest.mark.parametrize("script, flag", [(script, flag) for script in SCRIPTS for flag in CHANGES[script]])
def test_a_flag_that_can_change_the_result_changes_the_key(key, script, flag):
    if flag in ("eval_zero_shot", "tasks"):
        pytest.importorskip("lm_eval")
    both, more = CHANGES[script][flag]
    assert key(script, *both) != key(script, *both, *more)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_change_no_result_are_not_in_the_key(key, script):
    for both, more in SAME[script].values():
        assert key(script, *both) == key(script, *both, *more), more


# The code -------------------------------------------------------------------------------------------------------------


def test_other_code_has_another_key(key, monkeypatch):
    before = [key(script) for script in SCRIPTS]
    for module in (lib.config.keys, lib.sensitivity.compute):
        monkeypatch.setattr(module, "code_digest", lambda: "other")
    for script, known in zip(SCRIPTS, before, strict=True):
        assert {name for name, value in key(script).items() if value != known[name]} == {"code"}


def test_the_digest_of_the_code_is_that_of_its_content_wherever_it_is_installed(tmp_path):
    shutil.copytree(ROOT / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        code = "from lib.config.keys import code_digest; print(code_digest())"
        found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return found.stdout.strip()

    assert digest() == code_digest()
    with (tmp_path / "lib/depth/beam.py").open("a") as file:
        file.write("# a correction\n")
    assert digest() != code_digest()


def test_the_environment_names_version_and_commit(tmp_path):
    from lib.version import commit, version

    assert version(ROOT) and commit(tmp_path) is None
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        (tmp_path / "file").write_text("1")
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert commit(tmp_path) == head
    (Path(tmp_path) / "file").write_text("2")
    assert commit(tmp_path) == f"{head}+changes"
