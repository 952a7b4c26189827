"""The house: nine modules, imports that point one way, four packages, lines that fit a screen."""
import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = ("diffusion", "vae", "dit", "unet1d")
MODULES = (*GROUND, "guidance", "tasks", "sample", "train", "evaluate")
PACKAGES = {"torch", "numpy", "soundfile", "tqdm"}


def imports(path, anywhere=True):
    """Names of the modules that a file imports, anywhere or at its top (folder.module)."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (ROOT / node.module).is_dir():
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def imports_of(name):
    return imports(ROOT / f"{name}.py") & set(MODULES)


def test_imports_point_one_way():
    """No circle (graphlib raises CycleError); a trainer makes what sample.py opens."""
    order = list(TopologicalSorter({name: imports_of(name) for name in MODULES}).static_order())
    places = [order.index(name) for name in ("guidance", "tasks", "sample", "train")]
    assert places == sorted(places)
    assert "train" not in imports_of("sample") | imports_of("evaluate")


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_shares_the_diffusion_alone(name):
    """A network can be read, and taken, with nothing else of ours than the schedule."""
    assert imports_of(name) <= {"diffusion"}


def test_only_two_local_imports_lead_to_examples():
    """The examples import the nine. The built-in music and the page are imported where used."""
    used = {}
    for name in MODULES:
        path = ROOT / f"{name}.py"
        examples = {module for module in imports(path) if module.startswith("examples")}
        assert not examples & imports(path, anywhere=False), "no example belongs at the top"
        if examples:
            used[name] = examples
    assert used == {"train": {"examples.synthetic"}, "sample": {"examples.page"}}


def test_nine_modules_need_four_packages():
    """Those of requirements.txt without pytest; a further module has no home here."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(MODULES)
    for name in MODULES:
        allowed = PACKAGES | set(MODULES) | {"examples"} | sys.stdlib_module_names
        assert {module.split(".")[0] for module in imports(ROOT / f"{name}.py")} <= allowed


FILES = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_lines_fit_a_screen(path):
    """100 columns."""
    long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long, f"lines {long} are longer than 100 columns"
