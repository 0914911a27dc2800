"""The plugin host: built-ins, installed distributions and single files, through one set of hooks.

A third-party plugin that fails is named and reported, and the rest go on. A plugin that the
recipe itself names must load.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

import pluggy

from dreamkit import hookspecs
from dreamkit.errors import PluginError
from dreamkit.importing import import_file
from dreamkit.registry import KINDS, PluginFailure, Registries
from dreamkit.wording import one_line

ENTRY_POINT_GROUP = "dreamkit"
BUILTIN_PROVIDER = "dreamkit"
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
    "dreamkit.trackers",
)


def build_registries(plugins: Iterable[str] = ()) -> Registries:
    """Fill a fresh set of registries from built-ins, installed plugins and the named ones.

    Args:
        plugins: module names or paths of ``.py`` files, as in a recipe's ``plugins:``.

    Returns:
        The registries. Installed plugins that failed stand in ``failures``.

    Raises:
        PluginError: one of ``plugins`` cannot be loaded or registers a name that is taken.
    """
    registries = Registries()
    for room in _BUILTIN_ROOMS:
        _register(registries, importlib.import_module(room), BUILTIN_PROVIDER)
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    installed: list[tuple[str, Any]] = []
    for point in sorted(points, key=lambda point: (_provider_of(point), point.name)):
        provider = _provider_of(point)
        try:
            plugin = point.load()
            _register(registries, plugin, provider)
            installed.append((provider, plugin))
        except (Exception, SystemExit) as error:  # whatever a stranger's code raises
            registries.failures.append(PluginFailure(provider, _reason(error)))
    failed = {failure.plugin for failure in registries.failures}
    for provider in failed:  # a distribution is there as a whole or not at all
        registries.withdraw(provider)
    loaded = [plugin for provider, plugin in installed if provider not in failed]
    for reference in dict.fromkeys(_canonical(name) for name in plugins):
        try:
            plugin = _load(reference)
            if plugin not in loaded:  # a recipe may state that it needs an installed plugin
                _register(registries, plugin, reference)
        except (Exception, SystemExit) as error:
            raise PluginError(f"plugin '{reference}' cannot be loaded: {_reason(error)}") from error
    return registries


def _reason(error: BaseException) -> str:
    reason = one_line(error)
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def _canonical(reference: str) -> str:
    """Return a file's path in one spelling, so that ``x.py`` and ``./x.py`` are one plugin."""
    return os.path.normpath(reference) if reference.endswith(".py") else reference


def _register(registries: Registries, plugin: Any, provider: str) -> None:
    """Call one plugin's hooks, alone in a manager, so that provenance and failures are its own."""
    manager = pluggy.PluginManager("dreamkit")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    manager.check_pending()  # a misspelt hook name is an error, not silence
    hooks = [(kind, getattr(manager.hook, f"register_{kind}")) for kind in KINDS]
    if not any(hook.get_hookimpls() for _, hook in hooks):
        raise PluginError("it implements none of dreamkit's hooks (is '@hookimpl' missing?)")
    for kind, hook in hooks:
        hook(register=partial(registries[kind].register, provider=provider))
    if provider not in registries.providers:
        registries.providers.append(provider)


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
