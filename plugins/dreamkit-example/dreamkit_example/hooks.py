"""What dreamkit loads. References are followed on first use, so this imports no torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dreamkit.plugin import Register, hookimpl

if TYPE_CHECKING:
    import typer

    from dreamkit.plugin import Event

dreamkit_api = "1"
"""The version of ``dreamkit.plugin`` that this is written for."""

_log = logging.getLogger(__name__)


@hookimpl
def register_regularizers(register: Register) -> None:
    """Register ``color_balance``."""
    register("color_balance", "dreamkit_example.color_balance:ColorBalance")


@hookimpl
def register_synthesizers(register: Register) -> None:
    """Register ``sign_ascent``."""
    register("sign_ascent", "dreamkit_example.sign_ascent:SignAscent")


@hookimpl
def register_sources(register: Register) -> None:
    """Register ``stripes``."""
    register("stripes", "dreamkit_example.stripes:Stripes")


@hookimpl
def register_criteria(register: Register) -> None:
    """Register ``weight_std``."""
    register("weight_std", "dreamkit_example.weight_std:WeightStd")


@hookimpl
def register_losses(register: Register) -> None:
    """Register ``logit_anchor``."""
    register("logit_anchor", "dreamkit_example.logit_anchor:LogitAnchor")


@hookimpl
def register_distillation_losses(register: Register) -> None:
    """Register ``mse``."""
    register("mse", "dreamkit_example.mse:MSE")


@hookimpl
def register_applications(register: Register) -> None:
    """Register ``confidence``."""
    register("confidence", "dreamkit_example.confidence:Confidence")


@hookimpl
def register_trackers(register: Register) -> None:
    """Register ``extremes``."""
    register("extremes", "dreamkit_example.extremes:Extremes")


@hookimpl
def register_commands(app: typer.Typer) -> None:
    """Add ``dreamkit example``."""

    @app.command()
    def example() -> None:
        """Say what the example plugin is for."""
        print("dreamkit-example: copy me")


@hookimpl
def on_event(event: Event) -> None:
    """Log what batches of dreams came to, and that a run has ended."""
    from dreamkit.plugin import BatchDreamed, RunFailed, RunFinished  # with torch: not on top

    match event:
        case BatchDreamed(index=index, loss=loss):
            _log.info("batch %d: loss %.3f", index, loss)
        case RunFinished(report=report):
            _log.info("%s is finished", report["name"])
        case RunFailed(error=error):
            _log.info("ended by %s", type(error).__name__)
