"""The plugin host: built-ins, installed distributions and single files, through one set of hooks.

A third-party plugin that fails is named and reported, and the rest go on. A plugin that the
recipe itself names must load.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import itertools
import os
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from dreamkit import hookspecs
from dreamkit.errors import DuplicateEntry, PluginError, did_you_mean
from dreamkit.importing import import_file
from dreamkit.isolation import reason
from dreamkit.plugin import API
from dreamkit.registry import KINDS, PluginFailure, Registries

if TYPE_CHECKING:
    import typer

    from dreamkit.types import ChannelRule

ENTRY_POINT_GROUP = "dreamkit"
BUILTIN_PROVIDER = "dreamkit"
VARIABLE = "DREAMKIT_PLUGINS"
"""Of the environment: the installed plugins to load, with commas between; all if it is not set."""
_BUILTIN_ROOMS = (
    "dreamkit.regularizers",
    "dreamkit.synthesizers",
    "dreamkit.parameterisations",
    "dreamkit.teachers",
    "dreamkit.sources",
    "dreamkit.criteria",
    "dreamkit.pruning",
    "dreamkit.training.losses",
    "dreamkit.latency",
    "dreamkit.applications",
    "dreamkit.deploy",
    "dreamkit.quantizers",
    "dreamkit.trackers",
)


def build_registries(plugins: Iterable[str] = ()) -> Registries:
    """Fill a fresh set of registries from built-ins, installed plugins and the named ones.

    Args:
        plugins: module names or paths of ``.py`` files, as in a recipe's ``plugins:``.

    Returns:
        The registries. Installed plugins that failed stand in ``failures``.

    Raises:
        PluginError: one of ``plugins`` cannot be loaded or registers a name that is taken, or
            ``DREAMKIT_PLUGINS`` names one that is not installed.
    """
    return _loaded(plugins).registries


def with_commands(app: typer.Typer) -> tuple[typer.Typer, list[PluginFailure]]:
    """Return the program with the commands of installed plugins, and the plugins that failed.

    Args:
        app: the program; it is left as it is. A plugin that adds a command which is there already
            is left out with all of its commands.
    """
    import typer

    host, whole = _loaded(()), copy.copy(app)
    whole.registered_commands = list(app.registered_commands)
    whole.registered_groups = list(app.registered_groups)
    failures = []
    for provider, plugin in host.plugins:
        added = typer.Typer()
        try:
            host.hook(plugin, "register_commands")(app=added)
            taken = sorted(_names(added) & _names(whole))
            if taken:
                raise DuplicateEntry(f"there is a command '{taken[0]}' already")
        except (Exception, SystemExit) as error:
            failures.append(PluginFailure(provider, reason(error)))
            continue
        whole.registered_commands += added.registered_commands
        whole.registered_groups += added.registered_groups
    return whole, failures


def _names(app: typer.Typer) -> set[str]:
    from typer.main import get_group

    return set(get_group(app).commands)


def added_rules(
    registries: Registries, note: Callable[[str], None] = lambda text: None
) -> tuple[ChannelRule, ...]:
    """Return the channel rules of plugins, ready for use; pruning knows the built-in ones.

    Args:
        registries: one of an installed plugin that fails is added to its ``failures``.
        note: told of it.

    Raises:
        PluginError: one of a plugin that the recipe names cannot be loaded.
    """
    rules = registries["channel_rules"]
    found: list[ChannelRule] = []
    for name in rules:
        provider = rules.provider(name)
        if provider == BUILTIN_PROVIDER:
            continue
        try:
            found.append(rules.resolve(name)())
        except (Exception, SystemExit) as error:  # whatever a stranger's code raises
            told = f"the channel rule '{name}' of {provider} cannot be used: {reason(error)}"
            if provider in registries.named:
                raise PluginError(told) from error
            registries.failures.append(PluginFailure(provider, told))
            note(f"{told}; the rest go on without it")
    return tuple(found)


class PluginHost:
    """All plugins of a run in one manager, and what they registered."""

    def __init__(self) -> None:
        self.registries = Registries()
        self.plugins: list[tuple[str, Any]] = []
        """Each with its provider."""
        self._manager = pluggy.PluginManager("dreamkit")
        self._manager.add_hookspecs(hookspecs)

    def add(self, plugin: Any, provider: str) -> None:
        """Register a plugin and let it register its entries.

        Raises:
            Exception: whatever it raises; then its provider is to be withdrawn.
        """
        if self._manager.is_registered(plugin):  # a recipe may state that it needs an installed one
            return
        _check_api(plugin)
        self.plugins.append((provider, plugin))
        self._manager.register(plugin)
        self._manager.check_pending()  # a misspelt hook name is an error, not silence
        if not self._manager.get_hookcallers(plugin):
            raise PluginError("it implements none of dreamkit's hooks (is '@hookimpl' missing?)")
        for kind in KINDS:
            register = partial(self.registries[kind].register, provider=provider)
            self.hook(plugin, f"register_{kind}")(register=register)
        if provider not in self.registries.providers:
            self.registries.providers.append(provider)

    def hook(self, plugin: Any, name: str) -> pluggy.HookCaller:
        """Return one hook of one plugin, so that provenance and failures are its own."""
        others = [other for _, other in self.plugins if other is not plugin]
        return self._manager.subset_hook_caller(name, others)

    def withdraw(self, provider: str) -> None:
        """Remove a provider, its plugins and every entry of theirs."""
        for owner, plugin in self.plugins:
            if owner == provider and self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
        self.plugins = [pair for pair in self.plugins if pair[0] != provider]
        self.registries.withdraw(provider)

    def listen(self) -> None:
        """Tell the registries who listens to events, once every plugin is there."""
        self.registries.listeners = [
            (provider, partial(_tell, self.hook(plugin, "on_event")))
            for provider, plugin in self.plugins
            if self.hook(plugin, "on_event").get_hookimpls()
        ]


def _tell(hook: pluggy.HookCaller, event: Any) -> None:
    hook(event=event)


def _loaded(plugins: Iterable[str]) -> PluginHost:
    host = PluginHost()
    for room in _BUILTIN_ROOMS:
        host.add(importlib.import_module(room), BUILTIN_PROVIDER)
    for provider, points in itertools.groupby(_installed(), key=_provider_of):
        try:
            for point in points:
                host.add(point.load(), provider)
        except (Exception, SystemExit) as error:  # whatever a stranger's code raises
            host.withdraw(provider)  # a distribution is there as a whole or not at all
            host.registries.failures.append(PluginFailure(provider, reason(error)))
    for reference in dict.fromkeys(_canonical(name) for name in plugins):
        try:
            plugin = _load(reference)
            host.add(plugin, reference)
        except (Exception, SystemExit) as error:
            raise PluginError(f"plugin '{reference}' cannot be loaded: {reason(error)}") from error
        # It may be an installed one.
        host.registries.named += [owner for owner, known in host.plugins if known is plugin]
    host.listen()
    return host


def _installed() -> list[importlib.metadata.EntryPoint]:
    """Return the entry points to load, those of a distribution one after the other.

    Raises:
        PluginError: ``DREAMKIT_PLUGINS`` names one that is not there.
    """
    points = list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))
    points.sort(key=lambda point: (_provider_of(point), point.name))
    chosen = os.environ.get(VARIABLE)
    if chosen is None:
        return points
    wanted = {name.strip() for name in chosen.split(",")} - {""}
    known = {name for point in points for name in _called(point)}
    for name in sorted(wanted - known):
        raise PluginError(
            f"{VARIABLE}: no plugin '{name}' is installed{did_you_mean(name, known)} "
            f"(installed: {', '.join(sorted(known)) or 'none'})"
        )
    return [point for point in points if wanted & _called(point)]


def _called(point: importlib.metadata.EntryPoint) -> set[str]:
    """Return what a plugin goes by: its entry point, and the distribution that it came with."""
    return {point.name, *([] if point.dist is None else [str(point.dist.metadata["Name"])])}


def _check_api(plugin: Any) -> None:
    """Refuse a plugin that was written for another version of the contract.

    Raises:
        PluginError: its ``dreamkit_api`` is not this version.
    """
    wanted = str(getattr(plugin, "dreamkit_api", API))
    if wanted != API:
        raise PluginError(
            f"it is written for version {wanted} of dreamkit's plugin API, and this dreamkit has "
            f"version {API}: install a dreamkit that has it, or another version of the plugin"
        )


def _canonical(reference: str) -> str:
    """Return a file's path in one spelling, so that ``x.py`` and ``./x.py`` are one plugin."""
    return os.path.normpath(reference) if reference.endswith(".py") else reference


def _provider_of(point: importlib.metadata.EntryPoint) -> str:
    distribution = point.dist
    if distribution is None:
        return point.value
    name, version = distribution.metadata["Name"], distribution.metadata["Version"]
    return f"{name} {version}" if version else str(name)


def _load(reference: str) -> ModuleType:
    if reference.endswith(".py"):
        return import_file(reference)
    return importlib.import_module(reference)
