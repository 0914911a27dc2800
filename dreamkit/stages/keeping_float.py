"""Which layers stay in float: those that integers hurt most, by what they do to the outputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dreamkit.stages.quantizing import Workbench
from dreamkit.training.batches import Subset
from dreamkit.types import Images

EFFECT_IMAGES = 32
"""That the effect of a layer is measured on, at the most: it is measured layer by layer."""


@dataclass(frozen=True)
class Effect:
    """What a layer in integers does to the outputs.

    Args:
        layer: its name.
        error: by how much the mean squared error of the outputs falls when it alone goes back to
            float, a share of the error when all are in integers.
    """

    layer: str
    error: float


def effects(bench: Workbench, images: Images) -> list[Effect]:
    """Return the effect of every layer on some images, the largest first."""
    layers = bench.quantization.layers
    images = Subset(images, list(range(min(len(images), EFFECT_IMAGES))))
    right = bench.logits(bench.float_file, images)
    whole = _error(bench.logits(bench.write((), "all"), images), right)
    found = []
    with bench.context.log.progress("layers", len(layers)) as advance:
        for number, layer in enumerate(layers, 1):
            left = _error(bench.logits(bench.write((layer,), "without"), images), right)
            found.append(Effect(layer, (whole - left) / max(whole, 1e-30)))
            advance(number)
    return sorted(found, key=lambda effect: -effect.error)


def kept_for_effect(bench: Workbench, images: Images, budget: float) -> tuple[str, ...]:
    """Return the layers to leave in float: those of most effect, as many as time allows.

    One, two, four and so on are tried, as long as the error falls and the file is not slower than
    the budget allows; the last that does stays.

    Args:
        bench: the network.
        images: that effects are measured on.
        budget: how much longer it may take than with all layers in integers, a share.
    """
    ranked = effects(bench, images)
    bench.context.log.details["quantization_effects"] = {e.layer: e.error for e in ranked}
    names = [effect.layer for effect in ranked if effect.error > 0]
    right = bench.logits(bench.float_file, images)
    plain = bench.write((), "all")
    least, count = _error(bench.logits(plain, images), right), 1
    kept: tuple[str, ...] = ()
    while names and count // 2 < len(names):
        some = tuple(names[:count])
        file = bench.write(some, "some")
        error = _error(bench.logits(file, images), right)
        before, after = bench.times((plain, file), 1, 1)
        if error >= least or after.median_ms > (1 + budget) * before.median_ms:
            break
        least, kept, count = error, some, 2 * count
    return kept


def _error(found: Tensor, right: Tensor) -> float:
    return float((found - right).double().square().mean())
