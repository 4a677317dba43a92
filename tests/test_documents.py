"""README and docs: every command that they show is one that the command lines take."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import parse_args as parse_torchrun

import pipeline.cli
import serving.cli
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS: dict[str, Any] = {
    name: typer.main.get_command(module.app) for name, module in (("pipeline", pipeline.cli), ("serving", serving.cli))
}
FENCED = re.compile(r"^```(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)  # language and block
PROGRAMS = re.compile(r"(?:^|\| |-m (?:-- )?)((?:pipeline|serving|make) .*)")


def code_lines(text: str) -> Iterator[str]:
    """The lines of code blocks, those that go on joined; of YAML the command that the container runs."""
    text = text.replace("\\\n", " ")
    for language, block in FENCED.findall(text):
        yield from [yaml.safe_load(block)["command"][-1]] if language == "yaml" else block.splitlines()
    yield from re.findall(r"^    (.*)$", FENCED.sub("", text), re.MULTILINE)


def quoted(text: str) -> Iterator[str]:
    """What stands in backquotes, unless something is left out of it."""
    prose = re.sub(r"^    .*$", "", FENCED.sub("", text), flags=re.MULTILINE)
    yield from (code for code in re.findall(r"`([^`\n]+)`", prose) if "…" not in code and "[" not in code)


def commands(lines: Iterable[str]) -> Iterator[list[str]]:
    for line in lines:
        if found := PROGRAMS.search(line.removeprefix("$ ").strip()):
            yield shlex.split(found.group(1), comments=True)


TEXTS = [page.read_text(encoding="utf-8") for page in PAGES]
WHOLE = [command for text in TEXTS for command in commands(code_lines(text))]
MENTIONED = [command for text in TEXTS for command in commands(quoted(text))]


def parse(program: str, arguments: list[str]) -> None:
    """As the command line does, up to the point where it would run. Raises its usage errors."""
    if program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
        return
    group = GROUPS[program]
    context = group.make_context(program, list(arguments))
    name, command, rest = group.resolve_command(context, list(arguments))
    command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("command", WHOLE, ids=" ".join)
def test_the_command_line_takes_what_the_documents_show(command: list[str]) -> None:
    parse(command[0], command[1:])


def test_torchrun_takes_the_line_that_is_documented_and_leaves_the_options_of_pipeline_to_it() -> None:
    (line,) = [line for text in TEXTS for line in code_lines(text) if line.startswith("torchrun ")]
    options = parse_torchrun(shlex.split(line, comments=True)[1:])
    assert (options.module, options.training_script) == (True, "pipeline")
    assert options.training_script_args == next(commands([line]))[1:]
    assert "--run" in options.training_script_args


@pytest.mark.parametrize("command", MENTIONED, ids=" ".join)
def test_the_command_line_knows_what_the_documents_mention(command: list[str]) -> None:
    try:
        parse(command[0], command[1:])
    except Exception as error:
        if not str(error).startswith("Missing"):
            raise


def test_documents_show_commands_and_wrong_ones_are_found() -> None:
    assert len(WHOLE) > 25 and len(MENTIONED) > 20
    for wrong, told in ((["evaluate", "--precision-at-2"], "No such option"), (["evaluat"], "No such command")):
        with pytest.raises(Exception, match=told):
            parse("pipeline", wrong)


def test_the_readme_lists_every_command() -> None:
    listed = set(
        re.findall(r"^\| `(pipeline|serving) (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    there = {(name, command) for name, group in GROUPS.items() for command in group.commands}
    assert listed == there


def test_every_page_that_is_linked_is_there() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links {link}"


def test_every_file_of_the_source_that_is_mentioned_is_there() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"[`( ]((?:convline|models|serving|pipeline|tests|benchmarks)/[\w./-]+\w)", text):
            assert (ROOT / path).exists(), f"{page.name} mentions {path}"
