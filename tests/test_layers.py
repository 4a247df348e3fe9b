"""Imports between wings run one way, and what `--help` needs does not import torch: read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_merge"

# A wing imports from itself, from those below it, and from none above; modules beside the wings are front or ground.
FRONT = {"__main__", "cli", "api", "public", "inspection", "model_card", "pipelines"}
GROUND = {"abilities", "request", "keywords", "results", "progress"}
GROUND |= {"digests", "dtypes", "errors", "spec", "lora_merge"}
WINGS: dict[str, set[str]] = {
    "reporting": {"terminal", "output", "checkpoint"},
    "terminal": {"verification"},
    "verification": {"execution", "planning", "output", "checkpoint"},
    "execution": {"planning", "output", "checkpoint", "formats", "adapters", "models", "quantization"},
    "planning": {"checkpoint", "formats", "adapters", "models", "quantization"},
    "output": {"checkpoint"},
    "checkpoint": {"formats", "quantization"},
    "formats": {"models", "quantization"},
    "adapters": {"models"},
    "models": set(),
    "quantization": set(),
    "containers": set(),
    "system": set(),
}
EVERYWHERE = {"containers", "system"}
FORBIDDEN = {
    "formats": {"click", "tqdm", "transformers"},
    "adapters": {"click", "tqdm", "transformers"},
    "containers": {"click", "tqdm", "transformers"},
    "spec": {"torch", "numpy"},
    "errors": {"torch", "numpy"},
}
HEAVY = {"torch", "transformers", "peft", "safetensors", "accelerate"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """`lora_merge.formats.plain` lies in `formats`; the package itself in `lora_merge`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def reach(name: str) -> set[str]:
    """The rooms from which a room may import, its own left out."""
    if name in FRONT:
        return FRONT | GROUND | set(WINGS)
    if name in GROUND:
        return GROUND | EVERYWHERE
    if name in EVERYWHERE:
        return GROUND
    assert name in WINGS, f"lora_merge/{name} is in no wing: give it one here and in ARCHITECTURE.md"
    return WINGS[name] | GROUND | EVERYWHERE


def statements(nodes: list[ast.stmt], everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements: all of them, or only those that run when the module is imported."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif everywhere:
            yield from statements(
                [child for child in ast.walk(node) if isinstance(child, ast.stmt) and is_import(child)], True
            )
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, False)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)], False)


def is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def imported(module: str, everywhere: bool = True) -> set[str]:
    """Full names of the modules that `module` imports; a name imported from a module counts as that module."""
    names: set[str] = set()
    for node in statements(ast.parse(MODULES[module].read_text()).body, everywhere):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
            continue
        assert node.level == 0 and node.module, f"{module}:{node.lineno}: write imports in full"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            names.add(inner if inner in MODULES else node.module)
    return names


def imported_rooms(module: str) -> set[str]:
    """Our rooms and foreign packages that a module imports, its own room left out."""
    everywhere = module != "lora_merge"  # whose names for type checkers are all found lazily
    ours_or_foreign = {room(name) if name in MODULES else name.split(".")[0] for name in imported(module, everywhere)}
    return ours_or_foreign - {room(module)}


def run_on_import(start: str) -> dict[str, set[str]]:
    """Every module of ours that importing `start` runs, with the top-level names it imports."""
    seen: dict[str, set[str]] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in MODULES and name not in seen:
            seen[name] = imported(name, everywhere=False)
            waiting += [*seen[name], *(name.rsplit(".", dots)[0] for dots in range(1, name.count(".") + 1))]
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    unknown = {name for name in imported(module) if name.startswith("lora_merge") and name not in MODULES}
    assert not unknown, f"{module} imports what is not there: {sorted(unknown)}"
    if module == "lora_merge":  # its public names are found lazily
        return
    ours = imported_rooms(module) & {room(other) for other in MODULES}
    astray = sorted(ours - reach(room(module)))
    assert not astray, f"{module} imports from {astray}, which is not below it"


def test_rooms_form_no_circle() -> None:
    rooms = {room(module) for module in MODULES}
    graph: dict[str, set[str]] = {name: set() for name in rooms}
    for module in MODULES:
        graph[room(module)] |= imported_rooms(module) & rooms
    TopologicalSorter(graph).prepare()


def test_architecture_shows_these_wings() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    shown = re.findall(r"^\| `(\w+)/` \|", page, re.MULTILINE)
    assert set(shown) == set(WINGS) == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}


@pytest.mark.parametrize("wing", WINGS)
def test_every_wing_says_what_it_is_for(wing: str) -> None:
    told = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text()))
    assert told and told.split("\n")[0].endswith(".")


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in FORBIDDEN])
def test_walls_hold(module: str) -> None:
    crossed = imported_rooms(module) & FORBIDDEN[room(module)]
    assert not crossed, f"{module} imports {sorted(crossed)}"


@pytest.mark.parametrize(
    ("module", "below"), [("errors", set[str]()), ("dtypes", set[str]()), ("spec", {"lora_merge.dtypes"})]
)
def test_the_ground_floor_imports_nothing_of_ours(module: str, below: set[str]) -> None:
    assert {name for name in imported(f"lora_merge.{module}") if name.startswith("lora_merge")} == below


@pytest.mark.parametrize("start", ["lora_merge.__main__", "lora_merge.planning.plan"])
def test_help_and_plans_import_nothing_heavy(start: str) -> None:
    heavy = {
        module: sorted({name.split(".")[0] for name in names} & HEAVY) for module, names in run_on_import(start).items()
    }
    assert start in heavy
    assert not {module: names for module, names in heavy.items() if names}


@pytest.mark.parametrize("module", MODULES)
def test_no_input_is_ever_executed(module: str) -> None:
    source = MODULES[module].read_text()
    found = re.findall(r"\btorch\.load\(|\bpickle\.loads?\(|\bUnpickler\b|trust_remote_code\s*=\s*True", source)
    assert not found, f"{module} would run what an input says: {found}"
    assert not {"pickle", "cPickle", "dill", "joblib"} & {name.split(".")[0] for name in imported(module)}


def test_no_room_is_named_after_nothing() -> None:
    assert not [
        str(path) for path in MODULES.values() if path.stem in {"utils", "helpers", "common", "misc", "manager"}
    ]
