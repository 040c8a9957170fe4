"""The registries of methods are the one place that knows a method."""

import json
import subprocess
import sys

import pytest

import alp_prune
import ppllms
from lib.config.methods import ALLOCATORS, DEPTH_METHODS, METHODS, PRUNERS, AllocatorEntry, Method
from lib.errors import InputError
from tests.command import ROOT, run_alp


def every_entry():
    return [*DEPTH_METHODS.values(), *PRUNERS.values(), *ALLOCATORS.values()]


@pytest.mark.parametrize("entry", every_entry(), ids=lambda entry: entry.name)
def test_what_implements_a_method_exists(entry):
    assert callable(entry.load()) and entry.help and entry.paper


@pytest.mark.parametrize("entry", every_entry(), ids=lambda entry: entry.name)
def test_a_method_and_its_flags_are_in_the_help_with_the_defaults_of_the_entry(entry):
    parser = (ppllms if entry.name in DEPTH_METHODS else alp_prune).build_parser()
    assert f"  {entry.name} " in parser.format_help()
    known = {action.dest for action in parser._actions}
    for flag, default in entry.flags.items():
        assert flag in known and parser.get_default(flag) in (default, None), flag


def test_an_allocator_cannot_be_registered_without_its_formula():
    with pytest.raises(TypeError, match="implementation"):
        AllocatorEntry(name="new", help="a test", paper="none", needs="inputs")


def test_a_method_whose_formula_does_not_exist_fails_at_import():
    code = "from lib.config.methods import *\n"
    for registry, module, entry in (
        ("ALLOCATORS", "lib.sparsity.stages", 'AllocatorEntry(needs="inputs",'),
        ("PRUNERS", "lib.sparsity.stages", "PrunerEntry(needs_inputs=True,"),
        ("DEPTH_METHODS", "lib.depth.run", 'DepthMethod(removes="layers",'),
    ):
        code += f'{registry}["new"] = {entry} name="new", implementation="{module}:nothing", help="", paper="")\n'
        code += f"try:\n    import {module}\nexcept AttributeError as error:\n    print(error)\n"
        code += f'del {registry}["new"]\n'
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.count("has no attribute 'nothing'") == 3


def deepest_first(statistics) -> list[float]:
    """An allocator as somebody may add it: the deeper a layer, the more of it stays."""
    return [float(layer) for layer in range(len(statistics.summaries(lambda scores: 0.0)))]


def test_a_new_allocator_is_one_entry_and_one_function(alp_arguments, tmp_path, monkeypatch):
    entry = AllocatorEntry(
        name="deep",
        implementation=f"{__name__}:deepest_first",
        help="a test",
        paper="none",
        needs="inputs",
        flags={"alpha": 0.1},
    )
    monkeypatch.setitem(ALLOCATORS, "deep", entry)
    monkeypatch.setitem(METHODS, "magnitude_deep", Method("magnitude", "deep"))
    assert run_alp(*alp_arguments, "--prune_method", "magnitude_deep", monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["importance"] == [0.0, 1.0, 2.0, 3.0]
    assert result["layer_density"] == pytest.approx([0.2, 0.2 + 0.2 / 3, 0.2 + 0.4 / 3, 0.4])
    assert result["alpha"] == 0.1


def test_flags_of_one_method_are_refused_with_others():
    for flags, words in (
        (["--method", "sleb", "--beam_width", "2"], "--beam_width: --method sleb has no use for it"),
        (["--method", "sleb", "--mha_remove_layers", "2"], "is of --method ppllms; others go by --prune_rate"),
        (["--method", "random", "--dataset", "c4"], "--dataset: --method random has no use for it"),
    ):
        with pytest.raises(InputError, match=words):
            ppllms.parse(flags)
