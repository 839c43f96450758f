"""The README and docs keep their word: commands, options, paths and code blocks are real."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from torch.distributed.run import get_args_parser

from eagle_moe.experts import resolve_expert

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"cd", "git", "export", "sbatch"}
"""Commands whose arguments are not ours to check."""


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
            if language in languages:
                found.append(Block(page.name, language, body))
    return found


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every shell block; lines ending in a backslash are joined."""
    found = []
    for block in blocks("bash", "sh", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ").strip()
            if line and not line.startswith("#"):
                found.append((block.page, line))
    return found


def words_of(line: str) -> list[str]:
    """The command without settings of the environment in front and without what follows a pipe."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for stop in ("|", "&&", ";", ">"):
        words = words[: words.index(stop)] if stop in words else words
    return words


def options_in(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def check_make(words: list[str]) -> None:
    """Every target exists and gets the variables that it asks for."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def check_install(words: list[str]) -> None:
    """Every extra is one of ours."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        extra
        for word in words
        for extra in re.findall(r"[\w-]+", " ".join(re.findall(r"\[([^]]*)\]", word)))
    }
    assert extras <= set(project["optional-dependencies"])


def check_help(main, subcommands: list[str], words: list[str], capsys) -> None:
    """`--help` answers, and knows every option used."""
    with pytest.raises(SystemExit) as end:
        main([*subcommands, "--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    missing = [option for option in options_in(words) if option not in text]
    assert not missing, f"--help does not know {missing}"


def main_of(name: str) -> Callable[..., object]:
    """What `python -m name` runs."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"no module {name}"
    package = spec.submodule_search_locations is not None
    return importlib.import_module(f"{name}.__main__" if package else name).main


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_are_real(page, line, capsys, monkeypatch):
    missing = [path for path in re.findall(r"configs/[\w./-]+", line) if not (ROOT / path).exists()]
    assert not missing
    words = words_of(line)
    program, *arguments = [Path(words[0]).name, *words[1:]]
    if program == "make":
        check_make(words)
    elif program == "python" and arguments[0] == "-m":
        monkeypatch.setattr("sys.argv", [arguments[1]])
        check_help(main_of(arguments[1]), [], arguments[2:], capsys)
    elif program == "torchrun":
        at = arguments.index("-m")
        known = get_args_parser().format_help()
        assert [option for option in options_in(arguments[:at]) if option not in known] == []
        check_help(main_of(arguments[at + 1]), [], arguments[at + 2 :], capsys)
    elif program == "pip":
        check_install(arguments)
    elif program == "eagle-moe":
        subcommands = []
        for word in arguments:
            if not re.fullmatch(r"[a-z]+", word):
                break
            subcommands.append(word)
        main = importlib.import_module("eagle_moe.cli").main
        check_help(main, subcommands, arguments, capsys)
    else:
        assert program in ELSEWHERE, f"{page}: who checks `{line}`?"


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page)
def test_python_blocks_are_python(block):
    compile(block.text, block.page, "exec")


def test_python_of_the_readme_runs(tiny_folder, make_image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_image().save("picture.png")
    (code,) = [block.text for block in blocks("python") if block.page == "README.md"]
    model = re.search(r'model="([^"]+)"', code)
    assert model, "the block names a model folder"
    exec(compile(code.replace(model[1], str(tiny_folder)), "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.page)
def test_yaml_blocks_are_yaml(block):
    data = yaml.safe_load(block.text)
    if block.page == "README.md":
        assert all(resolve_expert(entry) for entry in data["experts"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    tops = "eagle_moe|eval|train|configs|tests|docs"
    named = re.findall(rf"`((?:{tops})/[\w./-]*)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_every_make_target_has_a_line():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
    helped = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = re.findall(r"^  ([a-z-]+) +\S", helped, re.M)
    assert sorted(targets) == sorted(phony.split())


def test_make_says_what_is_missing():
    done = subprocess.run(["make", "-n", "chat"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MODEL=" in done.stderr
