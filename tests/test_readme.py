"""README.md and the model card: their commands, flags and Python are the code's own, so that neither text can rot.

Edits run for real, in the README's order, with the shipped models, but one step; of training and evaluation the
arguments are parsed. A command without a rule below fails: give it one.
"""
import argparse
import importlib
import re
import shlex
import shutil
import string
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import conftest                         # puts the root on the path, also without pytest
import guidance

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "checkpoints/README.md")
CODE = re.compile(r"^```(\w*)\n(.*?)^```$|`(python [^`]+)`", re.MULTILINE | re.DOTALL)       # fenced, or in a sentence
RUN = {"sample.py": ["--steps", "1", "--num", "1"], "examples/synthetic.py": []}             # with these arguments more
PARSED = ("train.py", "evaluate.py", "examples/stable_audio_open.py", "tests/sanity.py", "tests/benchmark.py")
ELSEWHERE = ("pip install -r requirements.txt", "python -m pytest -q")                       # .ci/ runs these


def commands(text):
    """The commands of a text, in order, without comments; T="torchrun ..." is put where $T stands."""
    found, variables = [], {}
    for language, block, inline in CODE.findall((ROOT / text).read_text()):
        lines = block.replace("\\\n", " ").splitlines() if block else [inline.replace("\n", " ")]
        for command in [part for line in lines for part in line.split("&&") if not language]:
            words = shlex.split(string.Template(command).safe_substitute(variables), comments=True)
            if len(words) == 1 and "=" in words[0]:
                variables.update([words[0].split("=", 1)])
            elif words:
                found.append(shlex.join(words))
    return found


def module_of(script):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / Path(script).parent)
        return importlib.import_module(Path(script).stem)


def parser_of(script):
    """What main() parses its arguments with; it refuses abbreviated flags."""
    class Caught(Exception):
        pass

    def catch(parser, argv=None):
        raise Caught(parser)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        module_of(script).main([])
    parser, = caught.value.args
    parser.allow_abbrev = False
    return parser


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tracked files, or where there is no git, of what lies about; checkpoints as links."""
    tree = tmp_path_factory.mktemp("readme")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    found = [path.relative_to(ROOT) for pattern in ("*", "*/*") for path in ROOT.glob(pattern)]
    for name in [name for name in listed if name] or found:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).suffix == ".pt":
            (tree / name).symlink_to(ROOT / name)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.mark.parametrize("command", [words for text in TEXTS for words in commands(text) if words not in ELSEWHERE])
def test_commands_run_or_have_good_arguments(command, tree, monkeypatch):
    """Every script is there and knows its flags; what edits or makes audio does so."""
    monkeypatch.chdir(tree)
    words = shlex.split(command)
    at = next((i for i, word in enumerate(words) if word in (*RUN, *PARSED)), None)
    assert at and words[0] in ("python", "torchrun"), f"no rule for {command}: give it one at the top of this file"
    script, arguments = words[at], words[at + 1:]
    assert Path(script).exists()
    if words[0] == "torchrun":
        get_args_parser().parse_args(words[1:])
    parser_of(script).parse_args(arguments)
    module, before = module_of(script), set(tree.rglob("*.json"))
    if script in RUN:
        module.main(arguments + RUN[script])
        assert script != "sample.py" or set(tree.rglob("*.json")) > before, "nothing was written"
    elif hasattr(module, "parse"):
        module.parse(arguments)                             # it may check more than single flags


def test_python_of_the_readme_runs(tree, monkeypatch):
    """As printed, but for the number of steps."""
    monkeypatch.chdir(tree)
    sample = guidance.sample
    monkeypatch.setattr(guidance, "sample", lambda *args, **how: sample(*args, **how | {"steps": 1}))
    block, = (block for language, block, _ in CODE.findall(Path("README.md").read_text()) if language == "python")
    exec(compile(block, "README.md", "exec"), {})
    assert Path("infill.wav").exists()


@pytest.mark.parametrize("text", TEXTS)
def test_flags_in_sentences_exist(text):
    """Each --flag that a text names belongs to some script."""
    parsers = [get_args_parser(), *map(parser_of, (*RUN, *PARSED))]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / text).read_text())) <= known


LINK = re.compile(r"\[([\w.]+): `([^`]+)`\]\(\1#L\d+\)")       # [file.py: `code`](file.py#L12)


def with_right_lines(text):
    """The text, with each link to a line leading to the one line in which its code stands."""
    def link(match):
        name, code = match.groups()
        places = [i for i, line in enumerate((ROOT / name).read_text().splitlines(), 1) if code in line]
        assert len(places) == 1, f"`{code}` stands in {len(places)} lines of {name}: name what stands in one"
        return f"[{name}: `{code}`]({name}#L{places[0]})"
    return LINK.sub(link, text)


def test_links_lead_to_the_lines_that_they_name():
    """Every link to a line names code that stands in that line of that file, and nowhere else in it."""
    text = (ROOT / "README.md").read_text()
    assert len(LINK.findall(text)) == text.count(".py#L") > 10
    assert text == with_right_lines(text), "lines have moved: `python tests/test_readme.py` corrects the numbers"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_right_lines((ROOT / "README.md").read_text()))
