"""The recipe: what its top level holds, and how a file becomes one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from dreamkit.errors import (
    DreamkitError,
    OptionError,
    PluginError,
    RecipeError,
    RecipePath,
    did_you_mean,
)
from dreamkit.recipe.construct import Builder
from dreamkit.recipe.defaults import with_defaults
from dreamkit.recipe.nodes_of_file import plugin_names, read_nodes, split_presets
from dreamkit.recipe.overlay import apply_override, merge
from dreamkit.recipe.problems import Problem, located
from dreamkit.recipe.shares import MIX, MixOf, without_shares
from dreamkit.recipe.signature import options_of
from dreamkit.recipe.yaml_nodes import Node, dump_yaml
from dreamkit.registry import EntriesOf, EntryOf, Registries, mapping_of, name_key


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError("use letters, digits and '_.-': it names the run directory")
    return name


def check_device(device: str) -> str:
    """Return the name of a device, as it is given.

    Raises:
        ValueError: no device is called that; whether torch sees it is another matter.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device):
        raise ValueError("should be auto, cpu, cuda, cuda:N or mps")
    return device


@dataclass(frozen=True)
class Recipe:
    """A whole run. Entries are built, but nothing is loaded.

    Args:
        name: names the run directory.
        teacher: where the trained network comes from.
        application: what is done with it.
        synthesis: how images are dreamed; may be left out where the application reads
            its images elsewhere. A list dreams with several: see ``mixed``.
        evaluation: real images to report accuracy on; without it only agreement with
            the teacher is reported.
        latency: the backend that times models; the device's own by default.
        trackers: where records go besides ``log.jsonl``.
        seed: makes the dreams and the training repeatable.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        description: a line for people.
        plugins: modules or ``.py`` files to load first.
    """

    name: Annotated[str, AfterValidator(_check_name)]
    teacher: Annotated[Any, EntryOf("teachers")]
    application: Annotated[Any, EntryOf("applications")]
    synthesis: Annotated[Any | None, MixOf("synthesizers")] = None
    evaluation: Annotated[Any | None, EntryOf("sources")] = None
    latency: Annotated[Any | None, EntryOf("latency_backends")] = None
    trackers: Annotated[tuple[Any, ...], EntriesOf("trackers")] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Annotated[str, AfterValidator(check_device)] = "auto"
    description: str = ""
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.synthesis is None and self.application.needs_synthesis:
            raise OptionError("application", "it uses dreams, so the recipe needs 'synthesis'")
        term = None if self.synthesis is None else self.synthesis.needs_student
        if term is not None and not self.application.trains_student:
            named = ", or the option 'student'" if hasattr(self.synthesis, "student") else ""
            raise OptionError(
                "synthesis",
                f"{term} needs a student: an application that dreams against the one it trains "
                f"(distill with 'adaptive'){named}",
            )


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe with the nodes it was built from and the registries it was built by."""

    recipe: Recipe
    root: Node
    preset: str | None
    registries: Registries

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as it runs: presets and overrides applied, defaults written out."""
        whole: dict[str, Any] = with_defaults(self.registries, Recipe, self.root.plain())
        return whole

    def resolved_yaml(self) -> str:
        """Return the same as YAML, which reads as the same recipe."""
        return dump_yaml(self.resolved())

    def locate(self, path: RecipePath) -> str:
        """Return ``file:line:column path`` of a value, or of its nearest parent."""
        return located(self.root.place(path), path)

    def placed(self, error: DreamkitError) -> DreamkitError:
        """Return the error with the place it concerns, if it has one, put before its message."""
        if not error.path:
            return error
        return type(error)(f"{self.locate(error.path)}: {error.message}")


def read_recipe(
    file: str | Path,
    build_registries: Callable[[Sequence[str]], Registries],
    preset: str | None = None,
    overrides: Sequence[str] = (),
) -> LoadedRecipe:
    """Read and check a recipe whole: its base, the chosen preset, and the presets not chosen.

    A preset not chosen that names plugins of its own is not checked: they would have to be run.

    Args:
        file: the YAML file.
        build_registries: given the recipe's plugins, returns the registries to check against.
        preset: a name under ``presets``, or several with ``+`` between, laid on in turn.
        overrides: ``path=value`` texts, as of ``--set``.

    Raises:
        RecipeError: every problem, one a line, each with its place and the fix; a file that the
            chosen preset names and that is not there is one.
        PluginError: a plugin that the recipe names cannot be loaded.
    """
    checked = _check(file, build_registries, preset, overrides)
    _raise_if_any(checked.problems)
    return LoadedRecipe(checked.recipe, checked.root, preset, checked.registries)


def validate_recipe(
    file: str | Path,
    build_registries: Callable[[Sequence[str]], Registries],
    preset: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Registries, list[str]]:
    """Check a recipe as ``read_recipe`` does, but let files be missing.

    Returns:
        The registries, and a line for each file that a run would need and that is not there, and
        for each preset that was not checked.

    Raises:
        RecipeError: every other problem.
        PluginError: a plugin that the recipe names cannot be loaded.
    """
    checked = _check(file, build_registries, preset, overrides)
    _raise_if_any([problem for problem in checked.problems if not problem.missing])
    lines = [f"{problem} (needed to run)" for problem in checked.problems]
    return checked.registries, lines + checked.unchecked


def _raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise all problems as one error, each once though several presets may have it."""
    if problems:
        ordered = sorted(problems, key=lambda problem: problem.place.order)
        raise RecipeError("\n".join(dict.fromkeys(map(str, ordered))))


@dataclass(frozen=True)
class _Checked:
    """What came of checking a recipe; ``unchecked`` has a line for each preset left out."""

    recipe: Any
    root: Node
    registries: Registries
    problems: list[Problem]
    unchecked: list[str]


def _check(
    file: str | Path,
    build_registries: Callable[[Sequence[str]], Registries],
    preset: str | None,
    overrides: Sequence[str],
) -> _Checked:
    chosen, base, presets = chosen_nodes(Path(file), preset, overrides)
    registries = registries_of(chosen, build_registries)
    builder = Builder(registries)
    recipe, problems = _construct(chosen, builder)
    unchecked = []
    for name, overlay in presets.items():
        if name == preset:
            continue
        other = _spelled_out(merge(base, overlay, root=True))
        if not {*plugin_names(other)} <= {*plugin_names(chosen)}:
            place = located(presets[name].where, ("presets", name))
            unchecked.append(
                f"{place}: not checked, for it loads plugins of its own; check it "
                f"with --preset {name}"
            )
            continue
        _, others = _construct(other, builder)
        # The files of a preset not chosen are not needed.
        problems += [problem for problem in others if not problem.missing]
    return _Checked(recipe, chosen, registries, problems, unchecked)


def chosen_nodes(
    file: Path, preset: str | None, overrides: Sequence[str]
) -> tuple[Node, Node, dict[str, Node]]:
    """Return a recipe's nodes as they are to run, its base, and its presets.

    Raises:
        RecipeError: the file is no recipe, or has no such preset.
    """
    base, presets = split_presets(read_nodes(file))
    chosen = base
    for name in () if preset is None else preset.split("+"):
        if name not in presets:
            choices = ", ".join(presets) or "none"
            hint = did_you_mean(name, presets)
            raise RecipeError(f"{file}: no preset '{name}'{hint} (presets: {choices})")
        chosen = merge(chosen, presets[name], root=True)
    for override in overrides:
        chosen = apply_override(chosen, override)
    return _spelled_out(chosen), base, presets


def _spelled_out(root: Node) -> Node:
    """Return the recipe with mappings for what stands for them at its top: others read them there.

    That is a bare name, and a list of several of which one is asked for.
    """
    values = dict(root.value)
    for name, option in options_of(Recipe).items():
        node, marker = values.get(name), option.marker
        if node is None or marker is None or isinstance(marker, EntriesOf):
            continue
        if isinstance(node.value, str):
            given = mapping_of(marker.kind, node.value)
            written = {key: Node(text, node.where) for key, text in given.items()}
            values[name] = Node(written, node.where, dict.fromkeys(given, node.where))
        elif isinstance(node.value, list) and isinstance(marker, MixOf):
            values[name] = _mixed(node, marker.kind)
    return Node(values, root.where, root.keys)


def _mixed(node: Node, kind: str) -> Node:
    """Return the entry that a list of several stands for, everything in its own place."""
    told, shares = without_shares([child.value for child in node.value], Node(1.0, node.where))
    children = [
        Node(value, child.where, child.keys) for value, child in zip(told, node.value, strict=True)
    ]
    written = {name_key(kind): Node(MIX, node.where), "of": Node(children, node.where)}
    if shares is not None:
        written["shares"] = Node(shares, node.where)
    return Node(written, node.where, dict.fromkeys(written, node.where))


def registries_of(
    root: Node, build_registries: Callable[[Sequence[str]], Registries]
) -> Registries:
    """Return the registries with a recipe's plugins.

    Raises:
        PluginError: one of them cannot be loaded, with its place.
    """
    try:
        return build_registries(plugin_names(root))
    except PluginError as error:
        place = located(root.value["plugins"].where, ("plugins",))
        raise PluginError(f"{place}: {error}") from error


def _construct(root: Node, builder: Builder) -> tuple[Any, list[Problem]]:
    recipe, problems = builder.build(partial(builder.construct, Recipe), root.plain())
    return recipe, [replace(p, place=root.place(p.path, p.unknown)) for p in problems]
