"""Writes the parts of the pages that the code knows best: options, commands, hooks, events.

Pages print these functions in cog's blocks. ``python docs/generate.py`` runs every block anew;
with ``--check`` it says which pages are out of date, and changes nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cogapp import Cog
from typer.main import get_command

from dreamkit import errors, hookspecs, plugin
from dreamkit.cli.app import app
from dreamkit.plugins import BUILTIN_PROVIDER, build_registries
from dreamkit.recipe.schema import Recipe
from dreamkit.recipe.signature import OptionRow, describe, described, documentation, option_rows
from dreamkit.registry import name_key
from dreamkit.types import Event
from dreamkit.types.entries import BASES

DOCS = Path(__file__).parent
_SECTION = re.compile(r"^(?:Args|Attributes|Raises|Returns):\n(?:(?: {4}.*)?\n?)*", re.MULTILINE)
_OF_A_KIND = re.compile(rf"(?:one of the|list of(?: weighted)?) ({'|'.join(BASES)})")
_PARSED_ONLY = '<!-- skip: next "they need files; a test parses them" -->'


def entries(kind: str) -> str:
    """Return a heading, the docstring and the options of every built-in entry of a kind."""
    registry = build_registries()[kind]
    names = [name for name in registry if registry.provider(name) == BUILTIN_PROVIDER]
    classes = {f"`{name}`": registry.resolve(name) for name in names}
    parts = [_entry(title, cls, "") for title, cls in classes.items()]
    nested = {f"{cls.__name__}": cls for cls in _nested(classes.values())}
    if nested:
        parts.append("## Options that are mappings")
        parts += [_entry(title, cls, "", level=3) for title, cls in nested.items()]
    return "\n\n".join(parts)


def recipe() -> str:
    """Return the options at the top of a recipe."""
    return _options(Recipe, "entries/")


def kinds() -> str:
    """Return a table of the kinds of entries."""
    rows = [(kind, f"`{name_key(kind)}:`", f"[{kind}](entries/{kind}.md)") for kind in BASES]
    return _table(("kind", "named by", "page"), rows)


def _entry(title: str, cls: type[Any], folder: str, level: int = 2) -> str:
    text = _prose(inspect.getdoc(cls) or "")
    return f"{'#' * level} {title}\n\n{text}\n\n{_options(cls, folder)}".rstrip()


def _prose(text: str) -> str:
    """Return a docstring as Markdown, without what the tables say."""
    left = re.sub(r"\n{3,}", "\n\n", _SECTION.sub("\n", text))
    return re.sub(r"::$", ":", left, flags=re.MULTILINE).strip()


def _options(cls: type[Any], folder: str) -> str:
    text = documentation(cls)
    rows = [
        _option(row, described(text, row.name), folder)
        for row in option_rows(cls, build_registries())
    ]
    return _table(("option", "takes", "default", "what it is"), rows) if rows else ""


def _option(row: OptionRow, help: str, folder: str) -> tuple[str, ...]:
    takes = row.accepts.replace(" | ", " or ")
    if row.nested is not None:
        name = row.nested.__name__
        takes = takes.replace(name, f"[{name}](#{name.lower()})")
    takes = _OF_A_KIND.sub(
        lambda found: f"[{found[0].replace('_', ' ')}]({folder}{found[1]}.md)", takes
    )
    default = row.default if row.default in {"required", "its own defaults"} else f"`{row.default}`"
    return f"`{row.name}`", takes + (f", {row.range}" if row.range else ""), default, help


def _nested(classes: Iterable[type[Any]]) -> list[type[Any]]:
    """Return the classes of options that are mappings, each once, those inside others too."""
    found: dict[type[Any], None] = {}
    waiting = list(classes)
    while waiting:
        inside = [row.nested for row in option_rows(waiting.pop(0)) if row.nested is not None]
        waiting += [cls for cls in inside if cls not in found]
        found |= dict.fromkeys(inside)
    return list(found)


def benchmarks() -> str:
    """Return what stands in the README of the benchmarks below its title, as a page has it."""
    text = (DOCS.parent / "benchmarks" / "README.md").read_text(encoding="utf-8")
    text = text.partition("\n")[2].strip()
    text = text.replace("](../docs/evidence/", "](").replace("](../docs/", "](../")
    text = re.sub(r"\[([^]]*)\]\(((?:results|images)/[^)]*)\)", r"\1 (`benchmarks/\2`)", text)
    return re.sub(r"^(?: {4}.*\n)+", _fenced, text, flags=re.MULTILINE)


def _fenced(block: re.Match[str]) -> str:
    return f"```text\n{inspect.cleandoc(block[0])}\n```\n"


def commands() -> str:
    """Return a heading, the help and the options of every command."""
    return "\n\n".join(_command(path, made) for path, made in every_command())


def every_command() -> Iterator[tuple[str, Any]]:
    """Yield every command of dreamkit itself, by how it is called."""
    waiting = [("dreamkit", get_command(app))]
    while waiting:
        path, made = waiting.pop(0)
        inside = getattr(made, "commands", {})
        waiting = [(f"{path} {name}", command) for name, command in inside.items()] + waiting
        if path != "dreamkit":
            yield path, made


def examples(command: Any) -> list[str]:
    """Return the examples in a command's help."""
    _, *after = _help(command)
    return [line.strip() for line in "".join(after).splitlines() if line.strip()]


def _help(command: Any) -> list[str]:
    """Return what a command's help says, and its examples where it has any."""
    return re.split(r"^Examples?:\n", inspect.cleandoc(command.help or ""), flags=re.MULTILINE)


def _command(path: str, made: Any) -> str:
    text = _help(made)[0].strip()
    shown = "\n".join(examples(made))
    code = f"{_PARSED_ONLY}\n\n```bash\n{shown}\n```" if shown else ""
    table = "" if hasattr(made, "commands") else _parameters(made)
    return "\n\n".join(filter(None, (f"## `{path}`", text, code, table)))


def _parameters(command: Any) -> str:
    """Return a table of what a command takes; how it is typed, its function says."""
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    rows = []
    for parameter in command.params:
        if parameter.name not in hints:  # --help
            continue
        option = parameter.param_type_name == "option"
        names = parameter.opts if option else [parameter.metavar or parameter.name.upper()]
        given = f"`{parameter.default}`" if parameter.default else ""
        default = "required" if parameter.required else given
        takes = _values(hints[parameter.name])
        rows.append((", ".join(f"`{name}`" for name in names), takes, default, parameter.help))
    return _table(("argument", "takes", "default", "what it is"), rows)


def _values(annotation: Any) -> str:
    """Return what an argument takes, in words."""
    inside = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is list:
        return f"{describe(inside[0])}, repeatable"
    if annotation is bool:
        return "flag"
    return " or ".join(map(_values, inside)) if inside else describe(annotation)


def hooks() -> str:
    """Return a heading for every hook, what it is for, its base and the built-ins that use it."""
    specs = {n: f for n, f in vars(hookspecs).items() if hasattr(f, "dreamkit_spec")}
    return "\n\n".join(_hook(name, spec) for name, spec in specs.items())


def _hook(name: str, spec: Any) -> str:
    parts = [f"## `{name}({', '.join(inspect.signature(spec).parameters)})`", inspect.getdoc(spec)]
    kind = name.removeprefix("register_")
    if kind in BASES:
        base = BASES[kind].__name__
        parts.append(
            f"Derive the class from [`{base}`][dreamkit.plugin.{base}]. "
            f"[What comes with dreamkit](../reference/entries/{kind}.md) is derived from it too."
        )
    return "\n\n".join(map(str, parts))


def events() -> str:
    """Return a heading for every event, when it comes, and its fields."""
    return "\n\n".join(
        f"## `{event.__name__}`\n\n{_prose(inspect.getdoc(event) or '')}\n\n{_fields(event)}"
        for event in Event.__subclasses__()
    )


def _fields(cls: Any) -> str:
    text = inspect.getdoc(cls) or ""
    rows = [
        (f"`{f.name}`", f"`{f.type}`", described(text, f.name)) for f in dataclasses.fields(cls)
    ]
    return _table(("field", "type", "what it is"), rows)


def plugin_module(first: str, last: str) -> str:
    """Return the reference of ``dreamkit.plugin.__all__`` from one name to another."""
    names = plugin.__all__[plugin.__all__.index(first) : plugin.__all__.index(last) + 1]
    return "\n\n".join(f"::: dreamkit.plugin.{name}" for name in names if name != "Field")


def error_classes() -> str:
    """Return a table of the errors that a user can put right, and what each is."""
    found = [cls for cls in vars(errors).values() if inspect.isclass(cls)]
    rows = [
        (f"`{cls.__name__}`", f"`{cls.__mro__[1].__name__}`", _prose(inspect.getdoc(cls) or ""))
        for cls in found
        if issubclass(cls, Exception)
    ]
    return _table(("error", "is a", "what it is"), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([" ".join(cell.split()).replace("|", "&#124;") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def generate(check: bool) -> int:
    """Run the cog blocks of every page; return 0 if all is well.

    Args:
        check: compare with what is there, and write nothing.
    """
    pages = [str(page) for page in sorted(DOCS.rglob("*.md")) if "[[[cog" in page.read_text()]
    how = ["--check", "--diff"] if check else ["-r"]
    return int(Cog().main(["cog", "-P", "-I", str(DOCS), *how, *pages]))


if __name__ == "__main__":
    sys.exit(generate(check="--check" in sys.argv))
