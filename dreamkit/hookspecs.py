"""The hooks a plugin may implement: one for each kind of registry entry.

Each hook receives ``register(name, target)``. ``target`` is a class whose typed constructor
parameters become its options in YAML, or ``"package.module:Class"`` to import it on first use.
"""

from __future__ import annotations

import pluggy

from dreamkit.registry import Register

hookspec = pluggy.HookspecMarker("dreamkit")


@hookspec
def register_regularizers(register: Register) -> None:
    """Add regularizers: callables ``InversionStep -> scalar Tensor`` (``dreamkit.types``)."""


@hookspec
def register_synthesizers(register: Register) -> None:
    """Add synthesizers: ways to dream a batch of images from a teacher."""


@hookspec
def register_parameterisations(register: Register) -> None:
    """Add parameterisations: what an inversion's optimizer moves in place of pixels."""


@hookspec
def register_teachers(register: Register) -> None:
    """Add teacher sources: where trained models and their cards come from."""


@hookspec
def register_sources(register: Register) -> None:
    """Add image sources, for training and for evaluation."""


@hookspec
def register_criteria(register: Register) -> None:
    """Add importance criteria: callables ``PruningStep -> one score per channel of each group``."""


@hookspec
def register_channel_rules(register: Register) -> None:
    """Add rules of how layers and operations treat channels, for pruning to go through them."""


@hookspec
def register_losses(register: Register) -> None:
    """Add losses of learning new classes: callables ``IncrementalStep -> scalar Tensor``."""


@hookspec
def register_latency_backends(register: Register) -> None:
    """Add latency backends: ways to time a module on a device and runtime."""


@hookspec
def register_applications(register: Register) -> None:
    """Add applications: what is done with the dreams."""


@hookspec
def register_exporters(register: Register) -> None:
    """Add exporters: formats of files that other runtimes read."""


@hookspec
def register_trackers(register: Register) -> None:
    """Add trackers: where the records of a run are sent besides ``log.jsonl``."""
