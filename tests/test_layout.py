"""Imports of `lib` point one way: a file imports only from its own room and from rooms on lower floors."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {"errors", "files", "version", "demo"},
    {"config", "runtime", "storage"},
    {"models", "data", "reporting", "cli"},
    {"engine", "export"},
    {"sensitivity", "evaluation"},
    {"runs"},
    {"depth", "sparsity", "heal"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((ROOT / "lib").rglob("*.py"))
WITHOUT_TORCH = ("config", "storage", "cli")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "lib").with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lib."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lib.")}
    return found


def test_every_room_is_on_a_floor():
    assert {room_of(path) for path in FILES} - {"__init__"} == set(FLOOR)


def test_contributing_shows_every_room_on_its_floor():
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("```")[3]
    floor, shown = 0, {}
    for line in tree.splitlines():
        if match := re.match(r"(\d )?  ?\s?(\w+)(/|\.py) ", line):
            floor = int(match[1]) - 1 if match[1] else floor
            shown[match[2]] = floor
    assert shown == FLOOR


@pytest.mark.parametrize("room", sorted(set(FLOOR) - {"errors", "files", "version"}))
def test_a_room_says_what_lives_there_and_imports_just_what_it_says(room):
    about, _, imports = ast.get_docstring(ast.parse((ROOT / "lib" / room / "__init__.py").read_text())).partition(
        "\n\nMay import "
    )
    found = {name for path in FILES if room_of(path) == room for name in imported_rooms(path) - {room}}
    assert about and set(re.findall(r"`(\w+)`", imports)) - {"lib"} == found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_its_own_room_and_lower_floors(path):
    own = room_of(path)
    higher = {room for room in imported_rooms(path) - {own} if FLOOR[room] >= FLOOR[own]}
    assert not higher, f"imports {sorted(higher)}, not on a lower floor than {own}"


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_what_the_command_line_needs_imports_no_torch(room):
    """Every file of these rooms, with all that it imports; so `--help` and wrong flags answer at once."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if room_of(path) == room]
    heavy = ("torch", "transformers", "datasets", "numpy")
    code = f"import sys, {', '.join(modules)}; sys.exit(str(set(sys.modules) & set({heavy})))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stderr.strip() == "set()"
