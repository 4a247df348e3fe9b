"""How the command line presents itself: usage in the order in which one types, completion, and errors."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from lora_merge.errors import LoraMergeError, UsageError
from lora_merge.request import parse_size
from lora_merge.system.streams import leads_nowhere

PROGRAM = "lora-merge"
MERGE = "merge"
"""The command that need not be named."""


class Size(click.ParamType[int]):
    """Bytes: `2GB`, `500MiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class Command(click.Command):
    """A command whose usage has its words first and its options last."""

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        pieces = [piece for parameter in self.get_params(ctx) for piece in parameter.get_usage_pieces(ctx)]
        return [*pieces, "[OPTIONS]"]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(_typed(ctx), " ".join(self.collect_usage_pieces(ctx)))


class Group(click.Group):
    """`lora-merge BASE ADAPTER OUT` is the merge; a first word that names another command is that command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "-h", "--version"):
            args = [MERGE, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The help of the merge itself: it is what one asks for."""
        command = self.commands[MERGE]
        names = ctx.help_option_names
        with click.Context(command, info_name=ctx.info_name or PROGRAM, help_option_names=names) as inner:
            command.format_help(inner, formatter)
        others = [(name, one.get_short_help_str()) for name, one in self.commands.items() if name != MERGE]
        with formatter.section("Other commands"):
            formatter.write_dl(others)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The first word: BASE, a command, or an option of the merge.

        Shells show files only where there is nothing else, so commands are offered once a letter of them is there.
        """
        if incomplete.startswith("-"):
            found = self.commands[MERGE].shell_complete(ctx, incomplete)
            return found + [one for one in super().shell_complete(ctx, incomplete) if one.value == "--version"]
        commands = [name for name in self.commands if incomplete and name != MERGE and name.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file"), *map(CompletionItem, commands)]


def _typed(ctx: click.Context) -> str:
    """The first words of a command line: `lora-merge`, `lora-merge verify`."""
    return ctx.command_path.removesuffix(f" {MERGE}")


def tell_wrong_words(error: click.ClickException, given: Sequence[str]) -> int:
    """Print what click says of words that are no command line; the exit code."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return UsageError.exit_code
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    message = error.format_message()
    if ctx is not None:
        message = f"{message}{'' if message.endswith(('.', '?')) else '.'} See `{_typed(ctx)} --help`"
        if not wants_json(given):
            print(ctx.get_usage(), file=sys.stderr)
    return tell_error(UsageError(message), given)


def tell_error(error: LoraMergeError, given: Sequence[str]) -> int:
    """Print an error: a line on stderr, or with --json an object on stdout if that leads anywhere; the exit code."""
    if "--debug" in given:
        traceback.print_exception(error)
    if not (wants_json(given) and _print_object(error)):
        print(f"{PROGRAM}: {error}", file=sys.stderr)
    return error.exit_code


def wants_json(given: Sequence[str]) -> bool:
    """Whether `--json` is among the options of a command line."""
    words = list(given)
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def _print_object(error: LoraMergeError) -> bool:
    """Whether the error could be printed as JSON on stdout."""
    if sys.stdout is None or leads_nowhere(sys.stdout):
        return False
    try:
        print(json.dumps(error.as_json(), indent=2))
        sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True
