"""The modules import one another in the order that CONTRIBUTING.md gives."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lib":
            names = [f"lib.{alias.name}" for alias in node.names] if node.module == "lib" else [node.module]
            found.update(name.split(".")[1] for name in names)
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("lib."))
    return found


def test_a_module_imports_only_those_above_it():
    table = re.findall(r"^\| `lib/(\w+)(?:\.py|/)`", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    modules = {path.stem for path in (ROOT / "lib").glob("*.py")} - {"__init__"} | {"demo"}
    assert set(table) == modules and len(table) == len(modules)
    for place, name in enumerate(table):
        if name != "demo":
            below = _imports(ROOT / "lib" / f"{name}.py") - set(table[:place])
            assert not below, f"lib/{name}.py imports {below}, which stand below it"


def test_the_command_line_modules_import_no_torch():
    for name in ("errors", "files", "names", "plan", "gguf_file", "methods", "log", "cli"):
        text = (ROOT / "lib" / f"{name}.py").read_text()
        assert not re.search(r"^\s*(import|from) (torch|transformers|datasets)|^(import|from) numpy", text, re.M), name
