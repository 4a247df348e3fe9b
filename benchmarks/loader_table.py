"""The table of docs/loaders.md, from what `families.py --json` found.

    python benchmarks/loader_table.py

replaces the table and its reasons in the page by those of benchmarks/families.json.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "families.json"
PAGE = Path(__file__).parents[1] / "docs" / "loaders.md"
TITLE = "## Families\n"
COLUMNS = {
    "plain": "16 bits", "int4": "int4", "nf4": "NF4", "gptq": "GPTQ", "awq": "AWQ", "fp8": "fp8", "nvfp4": "NVFP4",
    "torchao": "torchao", "hqq": "HQQ", "quanto": "quanto", "eetq": "EETQ",
}  # fmt: skip
PART = 0.02
"""The share of the language model's matrices above which a file is in codes only in part."""
LIBRARY, ORACLE = "weights library", "weights oracle"
SERVERS = "vLLM's loader takes them one by one (tests/formats/test_vllm_rules.py)"
NAMED = (
    "The class names tensors otherwise than its files, or makes one of several; quanto's loader takes names as they are"
)
REASONS = (
    (r"loader of quanto cannot open.*(experts|router|mlp\.gate)", "refused",
     f"{NAMED}. Here these are experts, which the class stacks."),
    (r"loader of quanto cannot open", "refused", f"{NAMED}."),
    (r"has no attribute '(weight|dim|normal_)'|uniform_", "loader",
     "The class sets the weights of its linears as it is made, and gptqmodel's linears have no `weight`; gptqmodel by "
     "itself does not know this family, or not without more libraries."),
    (r"gptqmodel takes", "loader",
     f"transformers has experts as a stack, and gptqmodel does not know those of this family; {SERVERS}."),
    (r"^weights library", "library",
     "Experts. transformers leaves NVFP4's global scale out where it stacks them, and knows no way from single experts "
     "to Granite's stack; gptqmodel does not know Granite's, and looks for `gate_proj` where files of Mixtral and "
     f"Phi-MoE say `w1`, as published ones do; Jamba needs a library for GPUs there. {SERVERS}."),
    (r"in 16 bits: cls\.", "part", "The head's own linear, which is in no block."),
    (r"in 16 bits: model\.connector", "part", "The projector, which stays plain like towers."),
    (r"missing_keys \(.*experts", "loader",
     "transformers knows a stack of experts in this family and no way to it from single ones, which is how servers "
     f"want them; it does not open its own fp8 file of this family either. {SERVERS}. `--keep experts` leaves them "
     "plain."),
    (r"one stack of blocks|model's blocks alone", "refused",
     "transformers' loader of GPTQ takes the linears of one stack of blocks for quantized. `--keep` leaves the others "
     "plain."),
    (r"transformers 4|the plain model|You can update|ValueError: ", "loader",
     "transformers 4.57 does not open the plain model either, as transformers 5 saves it: the class is not in it yet, "
     "or names of tensors or keys of config.json are newer. Of a checkpoint that it opens, it opens the output."),
    (r"EETQ's kernels want both sides", "part", "Matrices with a side that is no multiple of 64."),
    (r"FalconLinear", "refused", "Falcon's linears are of a class of their own, which the loader passes over."),
    (r"in 16 bits: [\w.]*(experts|input_linear|output_linear)", "part",
     "Experts: the loader of this format takes none, or servers know nothing but stacks in 16 bits (gpt-oss)."),
    (r"loader that dequant|leaves short blocks|weights stay plain \(.*self_attn|does not divide into blocks", "part",
     "Matrices that are no whole blocks of 128 x 128, and what servers compute together with them: q, k and v of these "
     "tiny models, whose k and v have 64 rows."),
    (r"in 16 bits: backbone\.layers\.\d+\.mixer", "part", "Narrow linears of Mamba, and its parameters."),
    (r"columns do not divide into groups", "part", "Matrices whose columns are no multiple of the group size."),
    (r"keeps it in float32", "part", "What the class keeps in float32."),
    (r"derived from Linear", "part", "Linears of a class of their own, which the loader passes over."),
)  # fmt: skip
"""A pattern of what was told or noted, the mark, and the reason in the page."""
DECODED = "decoded"
"""No loader opens the file on a CPU: such cells are not counted."""
UNKNOWN = "not explained yet"
OPEN = "open"
"""A cell whose loader has not been seen failing without us (`loader_faults.py`)."""


@dataclass
class Table:
    """Rows of marks, and the reasons that they refer to."""

    rows: Mapping[str, Any]
    reasons: list[str] = field(default_factory=list)

    def mark(self, cell: Mapping[str, Any] | None) -> str:
        """`yes`, `part`, `library`, `decoded`, `refused`, `loader` or `open`, and the number of its reason."""
        if cell is None:
            return "-"
        told = " ".join((cell["told"], *cell["notes"]))
        if cell["mark"] == "ok" and cell["told"].startswith(ORACLE):
            return DECODED if (cell["share"] or 0) <= PART else f"{DECODED} {self.number(told, 'part')}"
        if cell["told"].startswith(LIBRARY):
            return f"library {self.number(told, 'library')}"
        if cell["mark"] == "ok" and (cell["share"] or 0) <= PART:
            return "yes"
        if cell["mark"] == "ok":
            return f"part {self.number(told, 'part')}"
        mark = "refused" if cell["mark"] == "refused" else "loader" if cell.get("own") else OPEN
        return f"{mark} {self.number(told, 'refused' if mark == 'refused' else 'loader')}"

    def number(self, told: str, mark: str) -> int:
        found = (text for pattern, kind, text in REASONS if kind == mark and re.search(pattern, told))
        text = next(found, f"{mark}: {UNKNOWN}: {told[:160]}")
        if text not in self.reasons:
            self.reasons.append(text)
        return self.reasons.index(text) + 1

    def lines(self) -> list[str]:
        head = ["| family | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        body = [
            f"| {family} | " + " | ".join(self.mark(row["cells"].get(column)) for column in COLUMNS) + " |"
            for family, row in self.rows.items()
        ]
        return head + body

    def only_dequantized(self) -> list[str]:
        """Families whose classes meet compressed linears with an error."""
        told = {family: [row["cells"].get(column, {}).get("told", "") for column in ("int4", "nvfp4")]
                for family, row in self.rows.items()}  # fmt: skip
        return [family for family, cells in told.items() if any("dequantized" in cell for cell in cells)]

    def figures(self) -> tuple[int, int, int, int]:
        """How many cells there are, how many hold, and how many of these in part, and by the library alone."""
        marks = [self.mark(row["cells"].get(column)).split()[0] for row in self.rows.values() for column in COLUMNS]
        marks = [mark for mark in marks if mark not in ("-", DECODED)]
        holding = sum(mark in ("yes", "part", "library") for mark in marks)
        return len(marks), holding, marks.count("part"), marks.count("library")


def built() -> dict[str, Any]:
    """The families that could be built, by model type."""
    rows: dict[str, Any] = json.loads(DATA.read_text())
    return {family: row for family, row in rows.items() if "-" not in row["cells"]}


def section() -> str:
    """Everything under the heading."""
    table = Table(built())
    lines = table.lines()
    cells, holding, part, library = table.figures()
    share = f"{100 * holding / cells:.1f} %"
    said = f"{len(table.rows)} families, {cells} cells: {holding} hold ({share}), {part} in part, {library} by library."
    decoded = sum(line.count(f"| {DECODED}") for line in lines)
    said = "\n".join(textwrap.wrap(f"{said} {decoded} more, of EETQ, are decoded.", 118))
    reasons = [f"| {number} | {text} |" for number, text in enumerate(table.reasons, 1)]
    head = ["| number | what it says |", "|---:|---|"]
    only = ", ".join(table.only_dequantized())
    needs = textwrap.wrap(f"compressed-tensors opened with `dequantize=True` alone: {only}.", 110)
    return "\n".join((said, "", *lines, "", "### Numbers", "", *head, *reasons, "", *needs, ""))


def main() -> None:
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(TITLE)] + TITLE + "\n" + section())


if __name__ == "__main__":
    main()
