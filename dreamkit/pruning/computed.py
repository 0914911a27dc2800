"""Layers whose weight is no parameter: each run computes it from others."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod


def computed_by(module: nn.Module) -> str | None:
    """Return what computes a layer's weight or bias as it runs; None if they are its own.

    That is a parametrization, ``weight_norm`` or ``spectral_norm`` of either kind, a mask of
    ``torch.nn.utils.prune``, or code of the layer's class.
    """
    for name in ("weight", "bias"):
        held = {**module._parameters, **module._buffers}
        if name in held or not isinstance(getattr(module, name, None), Tensor):
            continue
        if parametrize.is_parametrized(module, name):
            first = module.parametrizations[name][0]  # type: ignore[index]
            return _plain(type(first).__name__)
        for hook in module._forward_pre_hooks.values():
            if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
                masks = isinstance(hook, BasePruningMethod)
                return "torch.nn.utils.prune" if masks else _plain(type(hook).__name__)
        return "the code of its class"
    return None


def _plain(class_name: str) -> str:
    """Return the name by which users know one of PyTorch's classes, or the class's own."""
    known = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}
    return known.get(class_name.removeprefix("_"), class_name)


def why_left(module: nn.Module) -> str | None:
    """Return why the channels of a layer whose weight is computed stay; None if it is not."""
    found = computed_by(module)
    if found is None:
        return None
    cure = ": make them permanent by its remove()" if found == "torch.nn.utils.prune" else ""
    return f"its weight is computed on the fly by {found}{cure}"
