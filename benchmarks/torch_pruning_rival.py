"""A network pruned by Torch-Pruning, in a process of its own: the rival's part of a table.

pip install --no-deps --target FOLDER 'torch-pruning==1.6.*'
PYTHONPATH=FOLDER python benchmarks/torch_pruning_rival.py network.pt images.pt out.pt --flops 0.63

``network.pt`` is a module by torch.save, ``images.pt`` normalised images (N, C, H, W). Nothing of
dreamkit is imported. Groups are ranked together (``global_pruning``), step by step until the FLOPs
are met, and the classifier keeps its outputs; all that is not asked for is Torch-Pruning's default.
Its Taylor importance wants a loss: the cross-entropy to the classes that the network as it was
sees.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def multiplications(network: nn.Module, example: Tensor) -> float:
    """Return how often convolutions and linear layers multiply for an image.

    Torch-Pruning's own count passes over convolutions of a class of their own, such as those of
    EfficientNet-Lite's package.
    """
    found: list[int] = []

    def see(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.numel() * layer.weight[0].numel())

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(see) for layer in layers]
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return float(sum(found))


def prune(network: nn.Module, images: Tensor, options: argparse.Namespace) -> dict[str, float]:
    """Prune a network in place; return the shares of its FLOPs and parameters that are left."""
    toolkit: Any = importlib.import_module("torch_pruning")
    example = images[:1]
    with torch.no_grad():
        classes = torch.cat([network(part).argmax(1) for part in images.split(options.batch)])
        outputs = network(example).shape[1]
    kinds = {"taylor": "GroupTaylorImportance", "magnitude": "GroupMagnitudeImportance"}
    heads = [m for m in network.modules() if getattr(m, "out_features", None) == outputs]
    pruner = toolkit.pruner.BasePruner(
        network,
        example,
        importance=getattr(toolkit.importance, kinds[options.importance])(),
        global_pruning=True,
        pruning_ratio=options.most,
        max_pruning_ratio=options.most,
        iterative_steps=options.rounds,
        ignored_layers=heads,
        round_to=options.chunk,
    )
    left = whole = multiplications(network, example)
    parameters = sum(p.numel() for p in network.parameters())
    for _ in range(options.rounds):
        if left <= options.flops * whole:
            break
        if options.importance == "taylor":
            network.zero_grad()
            for part, wanted in zip(
                images.split(options.batch), classes.split(options.batch), strict=True
            ):
                (F.cross_entropy(network(part), wanted) * len(part) / len(images)).backward()
        pruner.step()
        left = multiplications(network, example)
    kept = sum(p.numel() for p in network.parameters())
    return {"flops_ratio": left / whole, "params_ratio": kept / parameters}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("network", type=Path, help="a module, by torch.save")
    parser.add_argument("images", type=Path, help="normalised images, by torch.save")
    parser.add_argument("out", type=Path, help="(module, numbers), by torch.save")
    parser.add_argument("--flops", type=float, required=True, help="share that is to be left")
    parser.add_argument("--importance", choices=["taylor", "magnitude"], default="taylor")
    parser.add_argument("--batch", type=int, default=32, help="images of a pass")
    parser.add_argument("--chunk", type=int, default=8, help="channels are left in multiples of it")
    parser.add_argument("--most", type=float, default=0.8, help="share of a layer that may go")
    parser.add_argument("--rounds", type=int, default=100, help="parts in which --most would go")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    # It is what the calling benchmark has written a moment ago.
    network: nn.Module = torch.load(options.network, weights_only=False).eval()
    images: Tensor = torch.load(options.images, weights_only=True)
    start = time.perf_counter()
    numbers = prune(network.requires_grad_(True), images, options)
    network.zero_grad()
    numbers["seconds"] = time.perf_counter() - start
    torch.save((network, numbers), options.out)


if __name__ == "__main__":
    main()
