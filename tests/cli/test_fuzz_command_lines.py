"""Whatever is given for whichever flags: the settings of a run, or one line, and no file is touched."""

import contextlib
import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import alp_prune
import ppllms
import save_gradient
from lib.cli import checks
from lib.errors import InputError, describe_failure
from tests.fuzzing import BOUNDED

NUMBERS = ["-1", "0", "1", "2", "0.5", "1e3", "1e400", "nan", "-inf", "0x10", "1_0", "٣", "2:4", "4:2", "25%", "0,25"]
NUMBERS += ["9" * 400, "1" + "0" * 5000]
WORDS = ["", " ", "auto", "cpu", "cuda:99", "bf16", "hf", "l1", "demo", "ALP", "ppllms", "true", "dense", "sleb"]
WORDS += ["magnitude", "alp-table2", "disk", "{}", "%s", "${HOME}", "-", "--", "--model", "=", "*"]
PATHS = ["/", ".", "..", "~", "~nobody/x", "/dev/null", "/dev/null/x", "/proc/self/mem", "x.json", "a/b", "a/b/c"]
PATHS += ["loop", "loop/x", "pipe", "x" * 300, "x/" * 3000, "ü" * 128]
CHARACTERS = ["\x00", "a\x00b", "a\nb", "\x1b[31m", "a\udcff", "\u202e", "🙂"]
HOSTILE = [*NUMBERS, *WORDS, *PATHS, *CHARACTERS]
SCRIPTS = {"ppllms": ppllms, "alp_prune": alp_prune, "save_gradient": save_gradient}
VALUES = st.sampled_from(HOSTILE) | st.text(max_size=12)


def command_lines(script) -> st.SearchStrategy[list[str]]:
    """Some flags of a script, each with values of the number that it takes or another."""
    flags = [action.option_strings[0] for action in script.build_parser()._actions if action.dest != "help"]
    word = st.sampled_from(flags) | st.sampled_from(["--nothing", "--model-name", "-x"])
    given_flag = st.tuples(word, st.lists(VALUES, max_size=2)).map(lambda pair: [pair[0], *pair[1]])
    joined = st.tuples(word, VALUES).map(lambda pair: ["=".join(pair)])
    return st.lists(given_flag | joined, max_size=4).map(lambda parts: [word for part in parts for word in part])


def everything(folder) -> list[tuple]:
    return sorted((path.name, path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to run in, with a loop of links and a pipe."""
    path = tmp_path_factory.mktemp("here")
    (path / "loop").symlink_to("loop")
    os.mkfifo(path / "pipe")
    (path / "x.json").write_text("{}")
    with contextlib.chdir(path):
        yield path


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_command_line_is_settings_or_one_line_and_touches_nothing(name, folder):
    script = SCRIPTS[name]
    before = everything(folder)

    @BOUNDED
    @given(command_lines(script))
    def holds(arguments: list[str]) -> None:
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                args = script.parse(arguments)
                if hasattr(script, "AXES") and checks.is_grid(args, script.AXES):
                    args.output_dir = args.output_dir or checks.grid_output_dir(name, args)
                if not getattr(args, "gguf", None):
                    script.check(args)
                    if script is alp_prune:
                        alp_prune.cells(args)
        except SystemExit as ended:
            line = told.getvalue()
            assert ended.code in (0, 2)
            assert ended.code == 0 or (line.count("\n") == 1 and line.endswith("\n") and line[:-1].isprintable()), line
        except InputError as error:
            told_line = describe_failure(error)
            assert told_line and told_line.isprintable()
        assert everything(folder) == before

    holds()
