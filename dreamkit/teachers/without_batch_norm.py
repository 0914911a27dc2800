"""Small networks of timm's classes that have no BatchNorm: a vision transformer, a ConvNeXt.

timm is imported where it is used: a saved student of another kind loads without it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def vision_transformer(
    num_classes: int,
    in_channels: int,
    size: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
) -> nn.Module:
    """Return a vision transformer (Dosovitskiy et al. 2021) of random weights.

    It takes any size that its patches divide.

    Args:
        num_classes: its outputs.
        in_channels: of images.
        size: of the images' sides.
        patch: of its patches' sides.
        width: channels of a token.
        depth: blocks.
        heads: of each block's attention.
    """
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=size,
        patch_size=patch,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        dynamic_img_size=True,
    )


def convnext(
    num_classes: int,
    in_channels: int,
    depths: Sequence[int],
    widths: Sequence[int],
    patch: int = 4,
    kernel: int = 7,
    stem: str = "patch",
    layer_scale: bool = True,
) -> nn.Module:
    """Return a ConvNeXt (Liu et al. 2022) of random weights.

    Args:
        num_classes: its outputs.
        in_channels: of images.
        depths: blocks of each of the four stages; maps have half of the side of those before.
        widths: channels of each stage.
        patch: pixels that the stem makes one of.
        kernel: of the depthwise convolutions' sides.
        stem: ``patch``, one convolution of the patches; ``overlap_tiered``, two of 3x3, which make
            one of 4x4 pixels; ``overlap_act``, the same with an activation between.
        layer_scale: multiply what each block adds by factors that start at 1e-6: for deep ones.
    """
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(
        in_chans=in_channels,
        num_classes=num_classes,
        depths=tuple(depths),
        dims=tuple(widths),
        kernel_sizes=kernel,
        patch_size=patch,
        stem_type=stem,
        ls_init_value=1e-6 if layer_scale else None,
    )
