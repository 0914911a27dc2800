"""The rooms of the package: imports point down only, and what has no room has no place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dreamkit"
LAYERS = (
    {
        *("types", "card", "errors", "version", "stopping", "distributed", "wording", "copying"),
        *("seeds", "docstrings"),
    },
    {
        "recipe",
        "registry",
        "events",
        "isolation",
        "model_state",
        "importing",
        "arithmetic",
        "compilation",
        "allocator",
        "memory",
        "out_of_memory",
        "flat_state",
        "graph_edges",
        "devices",
        "joined_images",
        "resizing",
        "colour_axes",
        "colour_shift",
        "onnx_model",
        "onnx_int8",
    },
    {
        *(
            "regularizers",
            "parameterisations",
            "teachers",
            "criteria",
            "sources",
            "latency",
            "pruning",
            "training",
        ),
        *("store", "evaluation", "report", "trackers", "quantizers"),
    },
    {"synthesizers"},
    {"stages"},
    {"applications"},
    {
        "runner",
        "run_report",
        "plugin",
        "plugins",
        "hookspecs",
        "deploy",
        "students",
        "checkup",
        "bench",
        "starters",
    },
    {"cli", "__main__", "api"},
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
SEPARATE = 2  # the rooms of this layer do not import one another
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "shared", "tools"}
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
CONTAINERS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(module: str, tree: ast.Module, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield line and name of every module of dreamkit that is imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                start = ".".join([*parts, *([start] if start else [])])
            inside = [f"{start}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else start for name in inside]
        else:
            continue
        for name in dict.fromkeys(names):
            if name.partition(".")[0] == "dreamkit":
                yield node.lineno, name


def violations(module: str, text: str, is_package: bool = False) -> list[str]:
    """Return what a module may not import, each with its line."""
    room, found = room_of(module), []
    for line, name in imports(module, ast.parse(text), is_package):
        if name == "dreamkit":
            found.append(f"{line}: imports the package itself, not the module that has the thing")
            continue
        other = room_of(name)
        if other not in LAYER:
            found.append(f"{line}: {name} has no layer")
        elif LAYER[other] > LAYER[room]:
            found.append(f"{line}: {name} is above (layer {LAYER[other]} over {LAYER[room]})")
        elif LAYER[room] == LAYER[other] == SEPARATE and room != other:
            found.append(f"{line}: {name} is another room of layer {SEPARATE}")
    return found


def test_the_package_was_found() -> None:
    assert {"dreamkit", "dreamkit.cli", "dreamkit.recipe", "dreamkit.recipe.schema"} <= set(MODULES)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "dreamkit"])
def test_every_module_has_a_layer(module: str) -> None:
    assert room_of(module) in LAYER, f"give {module} a place in LAYERS, or it a better home"


def test_every_place_in_the_table_is_taken() -> None:
    rooms = {room_of(module) for module in MODULES if module != "dreamkit"}
    assert set(LAYER) == rooms
    assert sum(map(len, LAYERS)) == len(LAYER)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "dreamkit"])
def test_imports_point_down_only(module: str) -> None:
    path = MODULES[module]
    assert violations(module, path.read_text("utf-8"), path.name == "__init__.py") == []


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {
            name
            for _, name in imports(
                module, ast.parse(path.read_text("utf-8")), path.name == "__init__.py"
            )
        }
        for module, path in MODULES.items()
        if module != "dreamkit"
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for name in sorted(graph.get(module, set())):
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("dreamkit.errors", "import dreamkit.registry"),
        ("dreamkit.store.dreams", "from dreamkit.synthesizers import deepinversion"),
        ("dreamkit.store.dreams", "from dreamkit.teachers.weights import load_into"),
        ("dreamkit.store.dreams", "def f():\n    from dreamkit.cli import main"),
        ("dreamkit.types", "if TYPE_CHECKING:\n    from dreamkit.registry import Term"),
        ("dreamkit.applications.prune", "from dreamkit import runner"),
        ("dreamkit.applications.prune", "from dreamkit import load_student"),
        ("dreamkit.applications.prune", "from ..runner import run"),
        ("dreamkit.applications.prune", "from .. import runner"),
        ("dreamkit.runner", "from dreamkit.nowhere import x"),
    ],
)
def test_the_check_finds_imports_that_point_up(module: str, text: str) -> None:
    assert len(violations(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            "dreamkit.applications.prune",
            "from dreamkit.store.dreams import DreamStore\nimport torch",
        ),
        ("dreamkit.store.dreams", "from dreamkit.store import atomic"),
        ("dreamkit.store.dreams", "from .atomic import write_json"),
        ("dreamkit.plugins", "from dreamkit import hookspecs"),
        ("dreamkit.hookspecs", "from dreamkit.registry import Register"),
    ],
)
def test_the_check_lets_imports_that_point_down_pass(module: str, text: str) -> None:
    assert violations(module, text) == []


def mutable_globals(text: str) -> list[str]:
    """Return the lower-case names that a module binds to something mutable, and ``global``s."""
    tree, found = ast.parse(text), []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        function = value.func if isinstance(value, ast.Call) else None
        called = getattr(function, "id", getattr(function, "attr", None))
        if isinstance(value, MUTABLE) or called in CONTAINERS:
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            found += [n for n in names if not n.isupper() and n != "__all__"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found += node.names
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_keeps_state(module: str) -> None:
    assert mutable_globals(MODULES[module].read_text("utf-8")) == []


def test_the_check_finds_module_state() -> None:
    text = "cache = {}\n_seen: set[str] = set()\nd = collections.defaultdict(list)\nx = [1]\n"
    assert mutable_globals(text) == ["cache", "_seen", "d", "x"]
    assert mutable_globals("def f():\n    global count\n    count = 1\n") == ["count"]
    assert mutable_globals("NAMES = ['a']\n__all__ = ['f']\nlimit = 3\n") == []


@pytest.mark.parametrize("module", MODULES)
def test_names_say_what_lives_there(module: str) -> None:
    assert not VAGUE & set(module.split("."))


PROGRAMS = {
    *("cli", "bench", "starters", "runner.py", "lock.py", "run_directory.py"),
    *("overlay.py", "weights.py", "distributed.py", "devices.py"),
    "network_name.py",
}
"""What the command line alone reaches, and what tells of --set and of torchrun beside others."""


def test_what_is_reached_from_python_speaks_of_no_flags() -> None:
    spoken = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not PROGRAMS & set(path.relative_to(PACKAGE).parts)
        for raised in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(raised, ast.Raise)
        for node in ast.walk(raised)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(^|\s)--[a-z]", node.value)
    ]
    assert spoken == []


def test_no_file_is_longer_than_one_sitting() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}
