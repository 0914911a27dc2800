"""Checks of entries, for a plugin's own tests: what dreamkit counts on of each kind.

Each takes an entry, or a class that is made without options, and raises ``AssertionError`` with
what is wrong::

    from dreamkit.plugin.testing import check_regularizer

    def test_contract():
        check_regularizer(HighFreq())

They run in a second, on tiny networks and the CPU. What an entry computes is for other tests.
"""

from dreamkit.plugin.testing.images import (
    check_parameterisation,
    check_source,
    check_synthesizer,
    check_teacher,
)
from dreamkit.plugin.testing.losses import (
    check_distillation_loss,
    check_incremental_loss,
    check_regularizer,
)
from dreamkit.plugin.testing.pruning import (
    check_criterion,
    check_latency_backend,
    check_selection,
)
from dreamkit.plugin.testing.runs import (
    check_application,
    check_exporter,
    check_quantizer,
    check_tracker,
)
from dreamkit.plugin.testing.tiny import ContractError, tiny_teacher

__all__ = [
    "ContractError",
    "check_application",
    "check_criterion",
    "check_distillation_loss",
    "check_exporter",
    "check_incremental_loss",
    "check_latency_backend",
    "check_parameterisation",
    "check_quantizer",
    "check_regularizer",
    "check_selection",
    "check_source",
    "check_synthesizer",
    "check_teacher",
    "check_tracker",
    "tiny_teacher",
]
