"""The shapes of a network's layers on the way of an image, and a layer of a shape to be timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from dreamkit.model_state import device_of, eval_mode, hooked
from dreamkit.types import LayerShape

_ACTIVATIONS = {
    *("ReLU", "ReLU6", "LeakyReLU", "SiLU", "GELU", "Hardswish", "Hardsigmoid", "Sigmoid", "Mish"),
    *("ELU", "Tanh"),
}


def layer_shapes(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, LayerShape]:
    """Return the shape of every layer that a forward pass calls, in its order.

    Layers are convolutions, linear ones, and BatchNorm of feature maps with the activation module
    that is called next, but for those in TorchScript. A convolution may have layers of its own,
    e.g. one that pads. Where it pads in its code, its shape has the padding that leads to the
    output it has.
    """
    from torchvision.ops import FrozenBatchNorm2d  # a second, and half of the runs need it not

    found: dict[str, LayerShape] = {}
    norms: list[str] = []

    def see(name: str, module: nn.Module, x: Tensor) -> None:
        norm = norms.pop() if norms else None
        if isinstance(module, nn.Conv2d):
            found[name] = LayerShape(
                kind="conv",
                c_in=module.in_channels,
                c_out=module.out_channels,
                kernel=tuple(module.kernel_size),
                stride=tuple(module.stride),
                padding=_padding(module),
                dilation=tuple(module.dilation),
                groups=module.groups,
                bias=module.bias is not None,
                feature_map=tuple(x.shape[2:]),
            )
        elif isinstance(module, nn.Linear):
            bias = module.bias is not None
            found[name] = LayerShape("linear", module.in_features, module.out_features, bias=bias)
        elif isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            size = x.shape[1]
            own = type(getattr(module, "act", None)).__name__  # timm's BatchNormAct2d
            activation = own if own in _ACTIVATIONS else ""
            found[name] = LayerShape(
                "norm", size, size, feature_map=tuple(x.shape[2:]), activation=activation
            )
            if not activation:
                norms.append(name)
        elif norm is not None and type(module).__name__ in _ACTIVATIONS:
            found[norm] = replace(found[norm], activation=type(module).__name__)

    counted = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if (not list(module.children()) or isinstance(module, counted))
        and not isinstance(module, torch.jit.ScriptModule)  # it takes no hooks
    ]
    example = torch.zeros(1, *input_size, device=device_of(model))
    with torch.no_grad(), eval_mode(model), hooked(layers, see), _padded(layers, found):
        model(example)
    return found


@contextmanager
def _padded(
    layers: Sequence[tuple[str, nn.Module]], found: dict[str, LayerShape]
) -> Iterator[None]:
    """Give the shapes of convolutions the padding that their outputs tell of."""

    def see(name: str, layer: nn.Module, inputs: object, output: Tensor) -> None:
        shape, size = found[name], tuple(output.shape[2:])
        if shape.output_size != size:
            found[name] = replace(shape, padding=_padding_to(shape, size))

    handles = [
        layer.register_forward_hook(partial(see, name))
        for name, layer in layers
        if isinstance(layer, nn.Conv2d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _padding_to(shape: LayerShape, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the padding on both sides with which a convolution puts out maps of a size.

    Where stride 1 wants an odd number of pixels, which no padding alike on both sides gives, the
    maps are one pixel larger.
    """
    axes = zip(shape.feature_map, shape.kernel, shape.stride, shape.dilation, size, strict=True)
    lacking = ((out - 1) * s + d * (k - 1) + 1 - given for given, k, s, d, out in axes)
    return tuple(max(0, (pixels + 1) // 2) for pixels in lacking)


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """Return a convolution's padding in pixels, also where it is given as a word."""
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return (0, 0)
    pairs = zip(layer.kernel_size, layer.dilation, strict=True)
    return tuple(dilation * (kernel - 1) // 2 for kernel, dilation in pairs)


def build_layer(shape: LayerShape, batch_size: int) -> tuple[nn.Module, Tensor]:
    """Return a layer of this shape and an input for it."""
    if shape.kind == "norm":
        parts: list[nn.Module] = [nn.BatchNorm2d(shape.c_out)]
        if shape.activation:
            parts.append(getattr(nn, shape.activation)())
        return nn.Sequential(*parts).eval(), torch.randn(
            batch_size, shape.c_out, *shape.feature_map
        )
    if shape.kind == "linear":
        layer: nn.Module = nn.Linear(shape.c_in, shape.c_out, bias=shape.bias)
        return layer.eval(), torch.randn(batch_size, shape.c_in)
    height, width = shape.feature_map
    layer = nn.Conv2d(
        shape.c_in,
        shape.c_out,
        (shape.kernel[0], shape.kernel[1]),
        (shape.stride[0], shape.stride[1]),
        (shape.padding[0], shape.padding[1]),
        (shape.dilation[0], shape.dilation[1]),
        shape.groups,
        shape.bias,
    )
    return layer.eval(), torch.randn(batch_size, shape.c_in, height, width)
