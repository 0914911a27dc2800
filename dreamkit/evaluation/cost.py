"""What a model costs: parameters and FLOPs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

with warnings.catch_warnings():
    # fvcore scripts its losses at import, which newer torch calls deprecated.
    warnings.simplefilter("ignore")
    from fvcore.nn import FlopCountAnalysis

from dreamkit.copying import copied
from dreamkit.model_state import hide_extra_state, to_eval


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of one image with a multiply-add counted once.

    ``uncounted`` lists operations that fvcore has no count for, with how often they occur.
    """

    params: int
    flops: int
    uncounted: dict[str, int]


def count(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count a model's cost for one image of (channels, height, width), with fvcore.

    The model itself is not touched: tracing runs on a copy on the CPU.
    """
    twin = copied(model).cpu()
    scripted = any(isinstance(m, torch.jit.ScriptModule) for m in twin.modules())
    if scripted:  # takes no hooks, by which fvcore tells layers apart
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(torch.zeros(1, *input_size))
        flops = counter.get_total_flops() // 2  # it counts a multiply-add twice
        return Cost(sum(p.numel() for p in model.parameters()), flops, {})
    to_eval(twin)
    hide_extra_state(twin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace, by which fvcore sees the graph
        analysis = FlopCountAnalysis(twin, torch.zeros(1, *input_size))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        flops = int(analysis.total())
        uncounted = {str(name): int(n) for name, n in analysis.unsupported_ops().items()}
    return Cost(sum(p.numel() for p in model.parameters()), flops, uncounted)
