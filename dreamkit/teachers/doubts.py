"""What is likely to be a mistake of whoever gives a network, and is said."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dreamkit.wording import and_more

Note = Callable[[str], None]


def doubt(model: nn.Module, note: Note, role: str) -> None:
    """Say what of a network is out of the ordinary, though it can be worked with."""
    parameters = list(model.named_parameters())
    still = [name for name, parameter in parameters if not parameter.requires_grad]
    if still:
        note(
            f"{role}: {len(still)} of its {len(parameters)} parameters are frozen "
            f"({and_more(still, 3)}); a student made of it learns with all of them"
        )
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if layers and not _storing(model):
        note(
            f"{role}: its {len(layers)} BatchNorm layers store no statistics "
            "(track_running_stats=False), so that there are none to match"
        )
    extra = [k for k, v in model.state_dict().items() if not isinstance(v, Tensor)]
    if extra:
        note(
            f"{role}: '{extra[0]}' is state that is no tensor; a saved student has what its "
            "builder gives it there"
        )


def doubt_training(model: nn.Module, note: Note, role: str) -> None:
    """Say so if a network that is taken for a trained one looks as if it were not."""
    stored = _storing(model)
    new = [name for name, layer in stored.items() if _untouched(layer)]
    if new and len(new) < len(stored):
        note(
            f"{role}: {len(new)} of its {len(stored)} BatchNorm layers hold the statistics of new "
            f"ones, mean 0 and variance 1 ({and_more(new, 3)}): were they loaded, are they used?"
        )
    if stored and len(new) == len(stored):
        note(
            f"{role}: its BatchNorm layers hold the statistics of a new network (mean 0, variance "
            "1): was it trained, and are these its weights? Dreams that match them show nothing of "
            "any training"
        )
    blank = [name for name, layer in stored.items() if _blank(layer)]
    if blank:
        note(
            f"{role}: {len(blank)} of its {len(stored)} BatchNorm layers hold a variance of 0 in "
            f"every channel ({and_more(blank, 3)}): were they loaded? Training leaves that only "
            "where all images give the same, and dreams cannot be measured by it"
        )


def _storing(model: nn.Module) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def _untouched(layer: _BatchNorm) -> bool:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return not bool(layer.running_mean.any()) and bool((layer.running_var == 1).all())


def _blank(layer: _BatchNorm) -> bool:
    assert layer.running_var is not None
    return not bool(layer.running_var.any())
