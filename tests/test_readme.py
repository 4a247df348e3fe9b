"""What README.md says is what the code does: formats, kinds, options, exit codes, commands, Python names."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import click
import pytest

import lora_merge
from lora_merge import cli, errors, request
from lora_merge.abilities import ABILITIES, PLAIN, QUANT_TYPES
from lora_merge.adapters import KINDS, LATER, NEVER
from lora_merge.dtypes import MODEL_DTYPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS: dict[str, click.Command] = dict(cli.app.commands)
CODE = re.compile(r"`([^`]+)`")


def section(title: str) -> str:
    """Text under a heading, up to the next heading of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n", README, re.MULTILINE)
    assert found, f"README.md has no section {title!r}"
    text = README[found.end() :]
    unfenced = re.sub(r"^```.*?^```$", lambda fence: " " * len(fence[0]), text, flags=re.MULTILINE | re.DOTALL)
    end = re.search(rf"^#{{1,{len(found[1])}}} ", unfenced, re.MULTILINE)
    return text[: end.start()] if end else text


def rows(text: str) -> list[list[str]]:
    """Cells of the first table in a text, without its head."""
    first = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = first[0].splitlines() if first else []
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def command_lines() -> list[list[str]]:
    """Words of every command shown in a bash block, without comments."""
    lines = "".join(blocks("bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_the_table_of_formats_is_the_code() -> None:
    listed = {row[0].strip("`"): (row[2], row[3], row[4]) for row in rows(section("Formats of weights"))}
    assert listed.pop(PLAIN)[:2] == ("yes", "yes")
    assert listed == {name: ("yes", has.written, str(has)) for name, has in ABILITIES.items()}


def test_the_table_of_roundings_is_the_code() -> None:
    assert {row[0].strip("`") for row in rows(section("Rounding"))} == set(request.ROUNDINGS)


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("dtype", MODEL_DTYPES),
        ("quant-type", QUANT_TYPES),
        ("rounding", request.ROUNDINGS),
        ("scales", request.SCALES),
        ("trained-on", request.TRAINED_ON),
    ],
)
def test_choices_are_all_told(option: str, known: Iterable[str]) -> None:
    row = next(row for row in rows(section("Use")) if row[0].startswith(f"`--{option} "))
    words = set(re.findall(r"[\w-]+", " ".join(CODE.findall(" ".join(row)))))
    assert set(known) <= words, set(known) - words


def test_the_table_of_kinds_is_the_code() -> None:
    assert [row[0].strip("`") for row in rows(section("Adapter kinds"))] == list(KINDS)


def test_refused_kinds_are_named() -> None:
    items = section("Limits").split("\n- ")
    never = next(item for item in items if "no merged weight" in item)
    later = next(item for item in items if "not read yet" in item)
    assert set(NEVER) <= set(CODE.findall(never))
    assert set(LATER) <= set(CODE.findall(later))


def test_the_table_of_exit_codes_is_the_code() -> None:
    listed = {int(code) for row in rows(section("What an error looks like")) for code in row[0].split(",")}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LoraMergeError)
    ]
    codes = {kind.exit_code for kind in kinds if kind is not errors.LoraMergeError}
    assert listed == codes | {0, 129, 130, 143}


def test_the_table_of_options_is_the_command() -> None:
    listed = {word.split()[0] for row in rows(section("Use")) for word in CODE.findall(row[0]) if word.startswith("--")}
    offered = {name for name in options(COMMANDS["merge"]) if name.startswith("--") and name != "--help"}
    assert offered - {"--no-verify"} == listed


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_commands_exist(words: list[str]) -> None:
    if words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[0] == "lora-merge" and words[1:] != ["--help"]:
        command = COMMANDS[words[1] if words[1] in COMMANDS else "merge"]
        used = {word for word in words[1:] if word.startswith("-")}
        assert used <= options(command), f"{sorted(used - options(command))} is no option of {command.name}"
    assert words[0] in {"make", "lora-merge", "pip"}


def test_the_first_two_commands_are_the_demo_and_the_tests() -> None:
    assert [words[:2] for words in command_lines()[:2]] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_names_exist(code: str) -> None:
    used = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lora_merge"
    }
    assert used and used <= set(lora_merge.__all__)


def test_links_lead_somewhere() -> None:
    for page in ROOT.glob("*.md"):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        gone = [link for link in links if "://" not in link and not (ROOT / link).exists()]
        assert not gone, f"{page.name} links to {gone}"
