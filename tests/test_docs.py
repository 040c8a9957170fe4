"""The documentation agrees with the command lines, and its links and example commands work."""

import importlib
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("ppllms", "save_gradient", "alp_prune")
PAGES = sorted([ROOT / "README.md", ROOT / "INSTALL.md", *(ROOT / "docs").glob("*.md")])
HEAL = "lib.heal.__main__"
COMMANDS = {script: f"{script}.py" for script in SCRIPTS} | {HEAL: "heal"}  # by module, as headings have them
FULL_TABLES = {"ppllms": "docs/depth-pruning.md", "save_gradient": "docs/sparsity.md", "alp_prune": "docs/sparsity.md"}
FULL_TABLES |= {HEAL: "docs/healing.md"}
OF_OTHER_TOOLS = {"--trust-remote-code", "--growth", "--llm_compressor", "--limit"}  # vllm's and the benchmarks'
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@cache
def flags(script: str) -> dict:
    """{flag: action} of a script's parser, without --help and --version."""
    actions = importlib.import_module(script).build_parser()._actions
    return {action.option_strings[0]: action for action in actions if action.dest not in ("help", "version")}


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next one of any level outside code."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    found = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", text, re.M | re.S)
    assert found, f"{page} has no heading {heading}"
    return found[1]


def flag_table(text: str) -> dict[str, str]:
    """{flag: default} of the rows `| --flag | default | meaning |`."""
    rows = re.findall(r"^\| `(--[^`]+)` \| (.+?) \| .+ \|$", text, re.M)
    assert len(rows) == text.count("\n| `"), "a row without one flag, a default and a meaning"
    assert len(rows) == len(dict(rows)), "a flag stands there twice"
    return dict(rows)


def wrong_default(action, told: str) -> str | None:
    """What is wrong with a default as a table has it: plain values are in backticks and alone, others in words."""
    if action.nargs == 0:
        return None if told == "off" else f"off, not {told}"
    if action.default is None:
        return f"in words, not {told}" if re.fullmatch(r"`[^`./]+`", told) else None
    values = action.default if isinstance(action.default, list) else [action.default]
    expected = f"`{' '.join(map(str, values))}`"
    return None if told == expected else f"{expected}, not {told}"


@pytest.mark.parametrize("script", COMMANDS)
def test_the_table_of_all_flags_is_that_of_the_parser(script):
    table = flag_table(section(FULL_TABLES[script], f"All flags of {COMMANDS[script]}"))
    assert set(table) == set(flags(script))
    wrong = {flag: found for flag, action in flags(script).items() if (found := wrong_default(action, table[flag]))}
    assert not wrong


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_has_ten_flags_of_each_script_with_their_defaults(script):
    table = flag_table(section("README.md", f"{script}.py"))
    assert len(table) == 10 and set(table) <= set(flags(script))
    assert not {flag: found for flag, told in table.items() if (found := wrong_default(flags(script)[flag], told))}


def test_the_readme_is_short_and_begins_with_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    blocks = [content for language, content in FENCE.findall(text) if language == "bash"][:2]
    assert len(blocks) == 2
    for block, end in zip(blocks, ("ppllms.py\n", "-m pytest -n 2 --dist worksteal\n"), strict=True):
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install") and block.endswith(end)
        assert block.count("\n") == 1


# Links ----------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {anchor + (f"-{number}" if number else "") for anchor, last in found.items() for number in range(last + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "code", FENCE.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_of_docs_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES if page.parent.name == "docs" and f"](docs/{page.name})" not in text]


# Commands -------------------------------------------------------------------------------------------------------------


_NAMES = "|".join((*SCRIPTS, r"lib\.heal"))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of every example command, in code blocks and in inline code."""
    code = [content for _, content in FENCE.findall(text)] + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    lines = [line for block in code for line in block.replace("\\\n", " ").splitlines()]
    found = [
        re.match(rf"\s*(?:python3?|torchrun|accelerate launch)\b.*?\b({_NAMES})(?:\.py\b|(?<=heal)(?= -))(.*)", part)
        for line in lines
        for part in line.replace(".venv/bin/", "").split("&&")
    ]
    return [(match[1].replace("lib.heal", HEAL), shlex.split(match[2], comments=True)) for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_example_commands_parse(page, capsys):
    wrong = []
    for script, arguments in commands(page.read_text(encoding="utf-8")):
        try:
            importlib.import_module(script).build_parser().parse_args(arguments)
        except SystemExit:
            wrong.append((script, arguments, capsys.readouterr().err))
    assert not wrong


def test_the_notebook_was_run_and_its_commands_parse():
    """Cells in order, none with an error, and no path of a machine in what they printed."""
    cells = [
        cell for cell in json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [one for one in outputs if one["output_type"] == "error"]
    assert not re.search(r"/(tmp|home|root|work|Users)/", json.dumps(outputs))
    found = commands(
        "\n".join(
            f"`{line.lstrip('!').partition(' 2>&1')[0]}`"
            for cell in cells
            for line in "".join(cell["source"]).split("\n")
        )
    )
    assert len(found) == 4
    for script, arguments in found:
        importlib.import_module(script).build_parser().parse_args(arguments)


def test_there_are_example_commands_of_every_script():
    found = [script for page in PAGES for script, _ in commands(page.read_text(encoding="utf-8"))]
    assert all(found.count(script) >= 3 for script in COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_named_in_the_text_exist(page):
    known = OF_OTHER_TOOLS.union(*map(flags, COMMANDS))
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert not {flag for flag in re.findall(r"`(?:\w+\.py )?(--[\w-]+)[^`\n]*`", text) if flag not in known}
