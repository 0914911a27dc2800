"""A network in INT8 by another tool, in a process of its own: the rival's part of int8.py.

    python benchmarks/int8_rival.py nncf FOLDER    # needs: pip install nncf onnx onnxruntime
    python benchmarks/int8_rival.py mct FOLDER     # needs: pip install model-compression-toolkit

FOLDER has ``network.onnx``, ``network.pt`` (the same module, by torch.save) and ``images.npy``,
normalised (N, C, H, W): what the tool is calibrated on. ``rival.onnx`` is written there, to be run
by ONNX Runtime, and ``rival.json``: the tool's version. All options are the tool's defaults.
Nothing of dreamkit is imported. MCT writes weights that are rounded but still float32, so that the
size and the speed of its file tell nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def by_nncf(folder: Path, images: Any) -> None:
    """Let NNCF (Intel) write a file with quantize operators: fast bias correction, MinMax."""
    nncf: Any = importlib.import_module("nncf")
    onnx: Any = importlib.import_module("onnx")
    network = onnx.load_model(folder / "network.onnx")
    name = network.graph.input[0].name
    dataset = nncf.Dataset(images, lambda image: {name: image[None]})
    onnx.save_model(nncf.quantize(network, dataset, subset_size=len(images)), folder / "rival.onnx")


def by_mct(folder: Path, images: Any) -> None:
    """Let Sony's Model Compression Toolkit write a file of rounded weights and activations."""
    mct: Any = importlib.import_module("model_compression_toolkit")
    torch: Any = importlib.import_module("torch")
    # It is what the calling benchmark has written a moment ago.
    network = torch.load(folder / "network.pt", weights_only=False).eval()
    with_plain_convolutions(network, torch.nn)

    def batches() -> Iterator[list[Any]]:
        for part in torch.from_numpy(images).split(32):
            yield [part]

    # It exports as torch did by default before 2.9, by tracing.
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    made, _ = mct.ptq.pytorch_post_training_quantization(network, batches)
    mct.exporter.pytorch_export_model(
        made,
        str(folder / "rival.onnx"),
        batches,
        quantization_format=mct.exporter.QuantizationFormat.FAKELY_QUANT,
    )


def with_plain_convolutions(network: Any, nn: Any) -> None:
    """Put padding and a convolution in the place of those of EfficientNet-Lite's package.

    They pad in their forward, and MCT looks for options of nn.Conv2d where such a class has others.
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if not hasattr(layer, "static_padding"):
                continue
            options = {"groups": layer.groups, "bias": layer.bias is not None}
            sides = (layer.kernel_size, tuple(layer.stride), layer.padding, layer.dilation)
            plain = nn.Conv2d(layer.in_channels, layer.out_channels, *sides, **options)
            plain.load_state_dict(layer.state_dict())
            pads = isinstance(layer.static_padding, nn.ZeroPad2d)
            setattr(parent, name, nn.Sequential(layer.static_padding, plain) if pads else plain)


TOOLS = {"nncf": ("nncf", by_nncf), "mct": ("model-compression-toolkit", by_mct)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tool", choices=list(TOOLS))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    package, quantize = TOOLS[options.tool]
    quantize(options.folder, np.load(options.folder / "images.npy"))
    told = {"tool": package, "version": importlib.metadata.version(package)}
    (options.folder / "rival.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
