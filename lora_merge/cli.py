"""The command line: options to a Request, errors to exit codes. No logic, and no torch until a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from signal import SIGINT
from typing import Any, NoReturn

import click

from lora_merge import __version__
from lora_merge.abilities import FORMATS, QUANT_TYPES, WIDTHS
from lora_merge.digests import DIGESTS
from lora_merge.dtypes import MODEL_DTYPES
from lora_merge.errors import LoraMergeError, StorageError, UsageError, printable
from lora_merge.request import (
    CARDS,
    COMBINES,
    DEFAULTS,
    FITS,
    ROUNDINGS,
    SCALES,
    TOKENIZERS,
    TRAINED_ON,
    Request,
)
from lora_merge.system.collecting import collecting_seldom
from lora_merge.system.shortage import COMPUTING, check_imports, telling_shortage
from lora_merge.system.signals import Signals, end, farewell
from lora_merge.system.stopping import Stop, Stopped
from lora_merge.system.streams import divert, printing, secure
from lora_merge.terminal.bar import Reporter
from lora_merge.terminal.report import (
    escape_what_cannot_be_shown,
    show_inspection,
    show_plan,
    show_report,
    show_result,
    show_verification,
)
from lora_merge.terminal.usage import PROGRAM, Command, Group, Size, tell_error, tell_wrong_words

COMMANDS = ("inspect", "verify", "report")
MEANT = {name: name for name in COMMANDS} | {"help": "--help", "version": "--version"}
"""What is meant by a first word that is like one of these and names no folder."""
SECTIONS = {
    "Inputs": (
        *("weight", "combine", "density", "alpha", "base_is_residual"),
        *("trained_on", "adapter_base", "allow_unused"),
    ),
    "Output": (
        *("bits", "format", "dtype", "quant_type", "double_quant", "group_size", "keep"),
        *("quantize_towers", "tokenizer", "card", "digest", "max_shard_size", "overwrite", "verify", "report"),
    ),
    "Rounding": ("rounding", "scales", "fit", "seed", "min_survival"),
    "Running": ("dry_run", "device", "max_memory", "threads", "resume", "restart"),
}
"""Options of the merge under the headings of its help; the rest are on what is printed."""
EXITS = """\b
Exit codes: 0 ok, 2 usage, 3 bad input, 4 adapter does not fit,
5 numeric failure, 6 unsupported, 7 output exists or in use,
8 I/O or disk full (resumable), 9 memory, 10 verification failed;
129, 130, 143 stopped by a signal."""


class Merge(Command):
    """Its help shows the options by `SECTIONS`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        shown = {option.name: record for option in options if (record := option.get_help_record(ctx))}
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([shown.pop(name) for name in names])
        with formatter.section("Report"):
            formatter.write_dl(list(shown.values()))


shared = [
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text."),
    click.option("-q", "--quiet", is_flag=True, help="No progress bar, no result; errors only."),
    click.option("--debug", is_flag=True, help="Show a traceback with an error."),
]


def with_shared(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(shared):
        function = option(function)
    return function


@click.group(cls=Group, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lora-merge")
def app() -> None:
    pass


def chosen(word: str, known: tuple[str, ...], text: str, metavar: str | None = None) -> Callable[[Any], Any]:
    """An option that takes one of the known words, with the default that Request has."""
    name = word.lstrip("-").replace("-", "_")
    default = DEFAULTS[name]
    kind = click.Choice(known, case_sensitive=False)
    return click.option(word, type=kind, metavar=metavar, default=default, show_default=default is not None, help=text)


@app.command(cls=Merge, epilog=EXITS)
@click.argument("paths", nargs=-1, required=True, metavar="BASE ADAPTER... OUT", type=click.Path(path_type=Path))
@click.option("--weight", type=float, multiple=True, help="Strength of an adapter; once for each, in their order.")
@chosen("--combine", COMBINES, "How the changes of several adapters become one.")
@click.option("--density", type=float, help="Share of the changes that stays with --combine ties, dare, magnitude.")
@click.option("--alpha", type=float, help="lora_alpha of an adapter file that has no config.")
@click.option("--base-is-residual", is_flag=True, help="BASE is the residual saved with a PiSSA, OLoRA, ... adapter.")
@chosen("--trained-on", TRAINED_ON, "Round a 16-bit BASE first onto the grid that a QLoRA adapter was trained over.")
@click.option(
    "--adapter-base",
    metavar="same|PATH",
    help="For an AWQ BASE: the original that the adapters were trained on; same: it was BASE itself.",
)
@click.option("--allow-unused", metavar="REGEX", help="Adapter tensors that may have no place in the base.")
@click.option("--bits", type=click.Choice(tuple(map(str, WIDTHS))), help="Width of the weights. Default: the base's.")
@chosen(
    "--format",
    FORMATS,
    f"Of the weights: {', '.join(FORMATS)}. Default: the base's if it has that width, else compressed-tensors.",
    metavar="NAME",
)
@chosen("--dtype", tuple(MODEL_DTYPES), "Of plain weights, and of the scales of others. Default: the base's own.")
@chosen("--quant-type", QUANT_TYPES, "Kind of codes, where a format has several.")
@click.option("--double-quant", is_flag=True, help="Quantize the scales too (bitsandbytes).")
@click.option("--group-size", type=int, help="Weights of a row that share a scale; -1: all of them.")
@click.option("--keep", metavar="REGEX", multiple=True, help="Modules that stay, or become, plain; repeatable.")
@click.option("--quantize-towers", is_flag=True, help="Quantize encoders of images and sounds, and projectors, too.")
@chosen("--tokenizer", TOKENIZERS, "Whose tokenizer, template and generation config; auto: the adapter's if it fits.")
@chosen("--card", CARDS, "README.md: a new model card with the base's beside it, or the base's as it is.")
@chosen("--digest", DIGESTS, "How lora_merge.json names the files: XXH3, or SHA-256, which costs as much as copying.")
@click.option("--max-shard-size", type=Size(), help="Cut shards at this size. Default: as the base is cut.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it is an earlier output; nothing else ever is.")
@click.option("--verify/--no-verify", default=False, help="Read OUT again before it is published.")
@click.option("--report", metavar="FILE.html", type=click.Path(), help="Write a page of all that was measured.")
@chosen("--rounding", ROUNDINGS, "How merged weights become codes; auto chooses for each by measuring.")
@chosen("--scales", SCALES, "Of merged weights: keep those of the base, or fit fresh ones.")
@chosen(
    "--fit",
    FITS,
    "Zero points of fresh scales: from lowest to highest value, or by HQQ's solver. Default: as the format's library.",
)
@click.option("--seed", type=int, default=DEFAULTS["seed"], show_default=True, help="Of what is drawn.")
@click.option(
    "--min-survival",
    type=float,
    default=DEFAULTS["min_survival"],
    show_default=True,
    help="Exit 5 if rounding leaves less than this of the change to any weight; 0: never.",
)
@click.option("--dry-run", is_flag=True, help="Show what would happen to each weight, and stop.")
@click.option("--device", default=DEFAULTS["device"], show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--max-memory", type=Size(), help="Limit of the process's own memory.")
@click.option("--threads", type=int, help="Threads that compute. Default: the cores there are, at most 8.")
@click.option("--resume", is_flag=True, help="Go on where an earlier run of the same job stopped.")
@click.option("--restart", is_flag=True, help="Throw away what an earlier run left behind.")
@click.option(
    "-v", "--verbose", is_flag=True, help="With --dry-run: every weight, and which adapter tensor changes it."
)
@with_shared
@click.pass_obj
def merge(
    stop: Stop, /, paths: tuple[Path, ...], dry_run: bool, as_json: bool, quiet: bool, verbose: bool, **options: Any
) -> None:
    """Merge adapters into a checkpoint, working on the weight files alone.

    BASE is a folder of weights (safetensors or PyTorch .bin), each ADAPTER a folder or file, OUT the new folder.
    Models in the hub's local cache go by their id, org/name[@revision]. No ADAPTER is a plain conversion. Inputs are
    never changed; OUT appears only when it is complete.
    """
    _check_words(paths)
    options.pop("debug", None)
    options["bits"] = int(options["bits"]) if options["bits"] else None
    request = Request.of(paths[0], paths[1:-1], paths[-1], **options)
    check_imports(COMPUTING, "torch")
    from lora_merge import api

    if dry_run:
        with collecting_seldom():
            plan = api.plan_request(request)
            if quiet and not as_json:
                return
            with printing("the plan"):
                show_plan(plan, as_json=as_json, verbose=verbose)
        return
    with Reporter(quiet=quiet or as_json) as reporter:
        result = api.merge_request(request, progress=reporter, stop=stop)
    if not quiet or as_json:
        with printing(f"{printable(paths[-1])}: is finished and complete, nothing is to be resumed; only the report"):
            show_result(result, as_json=as_json)


def _check_words(paths: tuple[Path, ...]) -> None:
    """UsageError where a command is misspelled, or OUT is missing."""
    first = str(paths[0])
    if meant := get_close_matches(first, MEANT, 1) if not os.path.exists(first) else []:
        said = f"{PROGRAM} {MEANT[meant[0]]}"
        raise UsageError(f"{printable(first)}: neither a command nor a folder; did you mean `{said}`?")
    if len(paths) < 2:
        raise UsageError(f"BASE and OUT are both needed: {PROGRAM} BASE ADAPTER... OUT")


@app.command(cls=Command, short_help="Formats, sizes and tensors of a checkpoint or adapter.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-v", "--verbose", is_flag=True, help="List every tensor.")
@with_shared
def inspect(path: Path, as_json: bool, quiet: bool, debug: bool, verbose: bool) -> None:
    """Show what a checkpoint or an adapter holds, from its headers alone."""
    check_imports(("lora_merge.api",), "")
    from lora_merge import api

    inspection = api.inspect(path)
    if quiet and not as_json:
        return
    with printing("what was found"):
        show_inspection(inspection, as_json=as_json, verbose=verbose)


@app.command(cls=Command, short_help="Prove a finished output: digests, index, finiteness; or recompute it.")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="Recompute every weight from this base.")
@click.option("--adapter", type=click.Path(path_type=Path), multiple=True, help="Adapters of the merge, in order.")
@click.option("--adapter-base", type=click.Path(path_type=Path), help="The original that the merge was given.")
@with_shared
def verify(
    out: Path,
    base: Path | None,
    adapter: tuple[Path, ...],
    adapter_base: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Read a finished output again and prove it against its own record, and against its inputs where given."""
    check_imports(*((COMPUTING, "torch") if base else (("lora_merge.public",), "")))
    from lora_merge import public

    with Reporter(quiet=quiet or as_json) as reporter:
        result = public.verify(out, base=base, adapters=adapter, adapter_base=adapter_base, progress=reporter)
    if not quiet or as_json:
        with printing(f"{printable(out)}: proves right; only the report"):
            show_verification(result, as_json=as_json)


@app.command(cls=Command, short_help="A page of all that was measured, by layer and module.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("file", metavar="[FILE.html]", required=False, type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace FILE.html also where it is no report.")
@with_shared
def report(out: Path, file: Path | None, as_json: bool, quiet: bool, debug: bool, overwrite: bool) -> None:
    """Write an HTML page of a finished output, from its record alone; by default OUT-report.html beside OUT.

    It opens without a network and runs no script.
    """
    check_imports(("lora_merge.public",), "")
    from lora_merge import public

    written = public.report(out, file, overwrite=overwrite)
    if not quiet or as_json:
        with printing(f"{printable(written.file)}: is written; only this line"):
            show_report(written, as_json=as_json)


def run(args: list[str] | None = None, stop: Stop | None = None) -> int:
    """The exit code of one command line; errors go to stderr. Raises Stopped soon after `stop` was asked."""
    given = sys.argv[1:] if args is None else args
    stop = stop or Stop()
    try:
        with telling_shortage():
            app.main(given, prog_name=PROGRAM, standalone_mode=False, obj=stop)
        return 0
    except click.exceptions.Exit as asked:
        return asked.exit_code
    except click.ClickException as error:
        return tell_wrong_words(error, given)
    except LoraMergeError as error:
        return tell_error(error, given)
    except (KeyboardInterrupt, click.Abort):
        print(farewell(SIGINT, stop), file=sys.stderr)
        return 130
    except SystemExit:  # how click answers a reader of --help that has gone away
        divert(sys.stdout)
        return 0
    except OSError as error:
        named = f"{error.filename}: " if error.filename is not None else ""
        failure = StorageError(f"{named}reading or writing failed: {error.strerror or error}")
        failure.__cause__ = error
        return tell_error(failure, given)


def main(args: list[str] | None = None, signals: Signals | None = None) -> NoReturn:
    """The command, to its end. signals: watches for them already; then the standard streams are secured, too.

    args: words of a caller in whose process this runs; signals and the end of the process are then its own affair.
    """
    if args is not None:
        sys.exit(run(args))
    if signals is None:
        secure()
        signals = Signals(Stop())
    escape_what_cannot_be_shown()
    try:
        code = run(args, signals.stop)
    except Stopped:
        signals.leave()
    end(code)
