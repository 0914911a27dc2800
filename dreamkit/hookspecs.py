"""The hooks a plugin may implement: one for each kind of entry, commands, and events.

A ``register_<kind>`` hook receives ``register(name, target)``. ``target`` is a class whose typed
constructor parameters become its options in YAML, or ``"package.module:Class"`` to import it on
first use. A hook may leave out arguments that it has no use for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from dreamkit.registry import Register

if TYPE_CHECKING:  # they come with what listing plugins does without
    import typer

    from dreamkit.types import Event

hookspec = pluggy.HookspecMarker("dreamkit")


@hookspec
def register_regularizers(register: Register) -> None:
    """Add regularizers: terms of the loss that images are dreamed by."""


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
    """Add importance criteria: scores of the channels that pruning may remove."""


@hookspec
def register_channel_rules(register: Register) -> None:
    """Add rules of how layers and operations treat channels, for pruning to go through them."""


@hookspec
def register_losses(register: Register) -> None:
    """Add losses of learning new classes."""


@hookspec
def register_distillation_losses(register: Register) -> None:
    """Add distillation losses: what a student's outputs are held against the teacher's by."""


@hookspec
def register_selections(register: Register) -> None:
    """Add selections: which of the ranked channels go in a round of pruning."""


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
def register_quantizers(register: Register) -> None:
    """Add quantizers: ways to write a network in integers for a runtime."""


@hookspec
def register_trackers(register: Register) -> None:
    """Add trackers: where the records of a run are sent besides ``log.jsonl``."""


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands to ``dreamkit``: ``@app.command()``, or ``app.add_typer`` for a group."""


@hookspec
def on_event(event: Event) -> None:
    """Hear of what happens in a run: ``isinstance(event, BatchDreamed)`` and so on."""
