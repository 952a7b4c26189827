"""The house: nine modules that stay small, import each other one way, and need four packages."""
import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = {"diffusion": 350, "guidance": 350, "tasks": 400, "vae": 350, "dit": 350, "unet1d": 350,
         "train": 850, "sample": 460, "evaluate": 600}
PACKAGES = {"torch", "numpy", "soundfile", "tqdm"}


def imports(path):
    """Names of the modules that a file imports, anywhere in it; those in folders of ours as folder.module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            ours = (ROOT / node.module).is_dir()
            found |= {f"{node.module}.{name.name}" for name in node.names} if ours else {node.module}
    return found


def test_imports_point_one_way():
    """Of the nine modules, and of the examples that they use: no circle (graphlib raises CycleError)."""
    files = {path.stem: path for path in ROOT.glob("*.py")} | {f"examples.{path.stem}": path
                                                               for path in ROOT.glob("examples/*.py")}
    order = list(TopologicalSorter({name: imports(path) & files.keys() for name, path in files.items()}).static_order())
    assert order.index("guidance") < order.index("tasks") < order.index("train") < order.index("evaluate")


def test_nine_modules_need_four_packages():
    """Those of requirements.txt without pytest; a further module has no home here."""
    assert {path.stem for path in ROOT.glob("*.py")} == LINES.keys()
    for name in LINES:
        known = PACKAGES | LINES.keys() | {"examples"} | sys.stdlib_module_names
        assert {module.split(".")[0] for module in imports(ROOT / f"{name}.py")} <= known


@pytest.mark.parametrize("name", LINES)
def test_a_module_is_read_in_one_sitting(name):
    """A module that grows beyond this holds an idea too many: find the simpler one, not denser lines."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert len(lines) <= LINES[name] and max(map(len, lines)) <= 120


def test_the_readme_stays_short():
    """200 lines and 16 kB; the rest is in checkpoints/README.md, and in what each file says of itself."""
    text = (ROOT / "README.md").read_bytes()
    assert text.count(b"\n") <= 200 and len(text) <= 16_000
