"""The tables of README and manual are what the code does: formats, kinds, options, roundings, exit codes, functions."""

from __future__ import annotations

import re
from collections.abc import Iterable

import click
import pytest
from pages import README, ROOT, Page, rows

import lora_merge
from lora_merge import cli, digests, errors, request
from lora_merge.abilities import ABILITIES, PLAIN, QUANT_TYPES
from lora_merge.adapters import KINDS, NEVER
from lora_merge.adapters.dialects import DIALECTS
from lora_merge.dtypes import MODEL_DTYPES

COMMANDS: dict[str, click.Command] = dict(cli.app.commands)
CODE = re.compile(r"`([^`]+)`")
OPTIONS, FORMATS_PAGE, ADAPTERS, ROUNDING, LIMITS, PYTHON = (
    Page(f"docs/{name}.md") for name in ("options", "formats", "adapters", "rounding", "limits", "python")
)


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_the_table_of_formats_is_the_code() -> None:
    listed = {row[0].strip("`"): (row[2], row[3], row[4]) for row in rows(README.section("Formats of weights"))}
    assert listed.pop(PLAIN)[:2] == ("yes", "yes")
    assert listed == {name: ("yes", has.written, str(has)) for name, has in ABILITIES.items()}


def test_the_table_of_roundings_is_the_code() -> None:
    assert {row[0].strip("`") for row in rows(ROUNDING.section("Ways of rounding"))} == set(request.ROUNDINGS)


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("dtype", MODEL_DTYPES),
        ("quant-type", QUANT_TYPES),
        ("rounding", request.ROUNDINGS),
        ("scales", request.SCALES),
        ("trained-on", request.TRAINED_ON),
        ("tokenizer", request.TOKENIZERS),
        ("card", request.CARDS),
        ("digest", digests.DIGESTS),
    ],
)
def test_choices_are_all_named(option: str, known: Iterable[str]) -> None:
    table = rows(OPTIONS.section("Options of a merge"))
    row = next(row for row in table if row[0].startswith(f"`--{option} "))
    words = set(re.findall(r"[\w-]+", " ".join(CODE.findall(" ".join(row)))))
    assert set(known) <= words, set(known) - words


def test_the_tables_of_options_are_the_command() -> None:
    table = rows(OPTIONS.section("Options of a merge"))
    listed = [word.split()[0] for row in table for word in CODE.findall(row[0])]
    offered = {name for name in options(COMMANDS["merge"]) if name.startswith("--") and name != "--help"}
    assert sorted(listed) == sorted(offered - {"--no-verify"})


def test_options_lie_under_the_headings_of_the_help() -> None:
    for title, names in cli.SECTIONS.items():
        listed = [word.split()[0] for row in rows(OPTIONS.section(title)) for word in CODE.findall(row[0])]
        assert listed == [request.option(name) for name in names]


def test_the_table_of_commands_is_the_code() -> None:
    listed = [CODE.findall(row[0])[0].split()[1] for row in rows(OPTIONS.section("Other commands"))]
    assert listed == list(cli.COMMANDS)


def test_defaults_are_the_code() -> None:
    table = {CODE.findall(row[0])[0].split()[0]: row[1] for row in rows(OPTIONS.section("Options of a merge"))}
    shown = {"--min-survival": "0.3 by default", "--seed": "0 by default", "--rounding": "`auto` (the default)"}
    shown |= {
        "--scales": "`auto` by default",
        "--trained-on": "`as-is` by default",
        "--tokenizer": "`auto` by default",
        "--card": "`new` by default",
        "--digest": "`xxh3` by default",
        "--device": "`auto` by default",
    }
    for option, words in shown.items():
        default = request.DEFAULTS[option.removeprefix("--").replace("-", "_")]
        assert words in table[option] and re.search(rf"(?<![\w.-]){re.escape(str(default))}(?![\w.-])", words)


def test_the_table_of_kinds_is_the_code() -> None:
    table = ADAPTERS.text.split("## Parts of LORA")[0]
    assert [row[0].strip("`") for row in rows(table)] == list(KINDS)


def test_the_table_of_dialects_is_the_code() -> None:
    assert [row[0] for row in rows(ADAPTERS.section("Files of other programs"))] == [one.name for one in DIALECTS]


def test_refused_kinds_are_named() -> None:
    paragraphs = LIMITS.section("Adapters that are not merged").split("\n\n")
    never = next(paragraph for paragraph in paragraphs if "no merged weight" in paragraph)
    assert set(NEVER) <= set(CODE.findall(never))


def test_the_table_of_exit_codes_is_the_code() -> None:
    listed = {int(code) for row in rows(README.section("Exit codes")) for code in row[0].split(",")}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LoraMergeError)
    ]
    codes = {kind.exit_code for kind in kinds if kind is not errors.LoraMergeError}
    assert listed == codes | {0, 129, 130, 143}


def test_the_table_of_functions_is_the_code() -> None:
    listed = [CODE.findall(row[0])[0].removeprefix("lora_merge.") for row in rows(PYTHON.text)]
    assert sorted(listed) == sorted(name for name in lora_merge.__all__ if name.islower() and name.isalpha())


def test_the_table_of_targets_is_the_makefile() -> None:
    listed = [CODE.findall(row[0])[0] for row in rows(Page("CONTRIBUTING.md").section("Set up"))]
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony and sorted(listed) == sorted(f"make {target}" for target in phony[1].split())


def test_what_the_demo_prints_is_shown() -> None:
    table = next(text for language, text in README.blocks if not language and "gain kept" in text)
    demo = (ROOT / "demo" / "demo.py").read_text()
    head, *body = table.splitlines()
    assert head in demo
    for row in body:
        name = row.strip().split("  ")[0]
        assert f'"{name}"' in demo or f"'{name}'" in demo, name


def test_figures_are_those_of_the_benchmark() -> None:
    table = rows(Page("benchmarks/README.md").section("The last table of merge.py"))
    median = next(row for row in table if "median" in row[0])
    cp, merge, _, peft = (float(cell.strip("*")) for cell in median[1:5])
    text = " ".join(README.text.split())
    assert f"merges in about {merge:.1f} s" in text
    assert f"`cp -r` of it takes {cp:.1f} s and a merge with PEFT {peft:.0f} s" in text
    memory = {row[0]: float(row[1]) for row in table if len(row) == 2}
    assert max(memory["lora-merge"], memory["lora-merge, 1 GB tensor"]) <= 200 and "takes about 200 MB" in text
