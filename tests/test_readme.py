"""README.md and the model card: their commands, flags, links and line counts are the code's own.

Edits run for real, in the README's order, with the shipped models, but one step; of training and
evaluation the arguments are parsed. A command without a rule below fails: give it one.
"""
import argparse
import importlib
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from torch.distributed.run import get_args_parser

import conftest                         # puts the root on the path, also when this file is run
import sample

ROOT = Path(conftest.__file__).resolve().parents[1]
TEXTS = ("README.md", "checkpoints/README.md")
CODE = re.compile(r"^```(\w*)\n(.*?)^```$|`(python [^`]+)`", re.MULTILINE | re.DOTALL)

COMMAND = re.compile(r"(python|torchrun|pip|git|\$[A-Z]) |[A-Z]=")

# Scripts that run, with these arguments more; scripts whose arguments are parsed; and the commands
# that .ci/run calls, or that need what is not here.
RUN = {"sample.py": ["--steps", "1", "--num", "1"], "examples/synthetic.py": []}
PARSED = ("train.py", "evaluate.py", "examples/stable_audio_open.py", "examples/cqtdiff.py",
          "examples/figure2.py", "examples/page.py", "examples/render.py",
          "examples/spectrograms.py", "tests/sanity.py", "tests/benchmark.py",
          "tests/patched_dit.py")
ELSEWHERE = ("pip install -r requirements.txt", "python -m pytest -q",
             "python -m pytest -q -m slow tests/test_scale.py",
             "git clone --depth 1 https://github.com/MutopiaProject/MutopiaProject")


def commands(text):
    """The commands of a text, in order, without comments; T="torchrun ..." replaces $T."""
    found, variables = [], {}
    for _, block, inline in CODE.findall((ROOT / text).read_text()):
        lines = [inline.replace("\n", " ")]
        if block:
            lines = block.replace("\\\n", " ").splitlines()
        for line in lines:
            for command in line.split("&&"):
                # Only what looks like a command: a block may also be a diagram, or Python.
                if not COMMAND.match(command.strip()):
                    continue
                command = string.Template(command).safe_substitute(variables)
                words = shlex.split(command, comments=True)
                if len(words) == 1 and "=" in words[0]:
                    variables.update([words[0].split("=", 1)])
                else:
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
    """A copy of the tracked files, or without git of what lies there; checkpoints as links."""
    tree = tmp_path_factory.mktemp("readme")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name]
    if not names:
        paths = [*ROOT.glob("*"), *ROOT.glob("*/*")]
        names = [str(path.relative_to(ROOT)) for path in paths]
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).suffix == ".pt":
            (tree / name).symlink_to(ROOT / name)
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree / name)
    return tree


FIRST = "python sample.py --task continuation --input examples/clip.wav"


def all_commands():
    """Each once, in order; but for the first, those that make audio are slow."""
    found = {}
    for text in TEXTS:
        for command in commands(text):
            if command not in ELSEWHERE and command not in found:
                makes_audio = any(script in command.split() for script in RUN)
                marks = [pytest.mark.slow] if makes_audio and command != FIRST else []
                found[command] = pytest.param(command, marks=marks)
    return found.values()


@pytest.mark.parametrize("command", all_commands())
def test_commands_run_or_have_good_arguments(command, tree, monkeypatch):
    """Every script is there and knows its flags; what edits or makes audio does so."""
    monkeypatch.chdir(tree)
    words = shlex.split(command)
    places = [i for i, word in enumerate(words) if word in (*RUN, *PARSED)]
    assert places, f"no rule for {command}: give it one at the top of this file"
    script, arguments = words[places[0]], words[places[0] + 1:]
    assert Path(script).exists()
    if script == "tests/patched_dit.py":                # behind its patch stand train.py's
        assert int(arguments[0]) > 1
        script, arguments = "train.py", arguments[1:]
    if words[0] == "torchrun":
        get_args_parser().parse_args(words[1:])
    if arguments[:1] == ["evaluate"]:                   # an example's door to evaluate.py
        arguments = arguments[1:]
        script = "evaluate.py"
        arguments = [word for word in arguments if word not in ("--window", "5.944")]
    parser_of(script).parse_args(arguments)
    module = module_of(script)
    before = set(tree.rglob("*.json"))
    if script in RUN:
        # Trials listen to each beginning three times, which takes minutes.
        trials = ["--trials", "1"] if {"embedding", "classifier"} & set(arguments) else []
        module.main(arguments + RUN[script] + trials)
        assert script != "sample.py" or set(tree.rglob("*.json")) > before, "nothing was written"
    elif hasattr(module, "parse"):
        module.parse(arguments)                         # it may check more than single flags


def test_the_infill_from_python_ends_in_a_sentence(tree, monkeypatch):
    """Without two files, and with a track that is shorter than the model's window."""
    monkeypatch.chdir(tree)
    soundfile.write("short.wav", np.zeros((44100, 2)), 44100)
    script = module_of("examples/from_python.py")
    for words, said in (([], "two files"), (["a.wav"], "two files"),
                        (["short.wav", "out.wav"], "short.wav is shorter")):
        monkeypatch.setattr(sys, "argv", ["from_python.py", *words])
        with pytest.raises(sample.UserError, match=said):
            script.main()


@pytest.mark.slow
def test_the_infill_from_python_runs(tree, monkeypatch):
    """examples/from_python.py as it stands, in fewer steps."""
    monkeypatch.chdir(tree)
    module_of("examples/from_python.py").infill("examples/clip.wav", "infill.wav", steps=1)
    assert Path("infill.wav").stat().st_size > 10**6


@pytest.mark.parametrize("text", TEXTS)
def test_flags_in_sentences_exist(text):
    """Each --flag that a text names belongs to some script."""
    parsers = [get_args_parser(), *map(parser_of, (*RUN, *PARSED))]
    flags = {"--depth"} | {flag for parser in parsers for flag in parser._option_string_actions}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / text).read_text())) <= flags


# [file.py: `code`](file.py#L12), or (../file.py#L12)
LINK = re.compile(r"\[([\w.]+): `([^`]+)`\]\(((?:\.\./)?\1)#L\d+\)")
COUNT = re.compile(r"^(\S+\.py) +(\d+) ", re.MULTILINE)         # file.py   120 ...


def lines_of(name):
    return (ROOT / name).read_text().splitlines()


def with_right_numbers(text):
    """The text, with links to the lines in which their code stands, and with counts of lines."""
    def link(match):
        name, code, path = match.groups()
        places = [i for i, line in enumerate(lines_of(name), 1) if code in line]
        assert len(places) == 1, f"`{code}` stands in {len(places)} lines of {name}"
        return f"[{name}: `{code}`]({path}#L{places[0]})"

    def count(match):
        name, number = match.groups()
        right = str(round(len(lines_of(name)), -1))
        return match[0].replace(f" {number} ", f" {right.rjust(len(number))} ")
    return COUNT.sub(count, LINK.sub(link, text))


def test_links_and_counts_of_lines_are_right():
    """Every link to a line names code that stands in that line, and nowhere else in its file."""
    for name in TEXTS:
        text = (ROOT / name).read_text()
        assert len(LINK.findall(text)) == text.count(".py#L") > 0
        assert text == with_right_numbers(text), "`python tests/test_readme.py` corrects them"
    assert len(COUNT.findall((ROOT / "README.md").read_text())) == 9


def test_local_links_lead_to_files():
    """Every link to a file of the repository, in both texts."""
    for text in TEXTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / text).read_text()):
            assert (ROOT / text).parent.joinpath(target).exists(), f"{text}: {target}"


if __name__ == "__main__":
    for name in TEXTS:
        (ROOT / name).write_text(with_right_numbers((ROOT / name).read_text()))
