"""Proxy images that need no download: patches of the two photographs that scikit-learn brings.

    python benchmarks/photograph_patches.py patches --images 3072

A network shows much of what it knows on patches of a single photograph (Asano & Saeed,
"Extrapolating from a Single Image to a Thousand Classes using Distillation", ICLR 2023).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder; a proxy's class folders lie in it")
    parser.add_argument("--images", type=int, default=3072)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    folder = options.out / "photographs"
    folder.mkdir(parents=True)
    draws = torch.Generator().manual_seed(options.seed)
    for number in range(options.images):
        photograph = photographs[number % len(photographs)]
        width, height = photograph.size
        most = min(width, height)
        share, across, down = torch.rand(3, generator=draws).tolist()
        # Sizes are as likely in each octave: a patch is an object as often as a texture.
        cut = round(options.side * (most / options.side) ** share)
        left, top = round(across * (width - cut)), round(down * (height - cut))
        patch = photograph.crop((left, top, left + cut, top + cut))
        patch = patch.resize((options.side, options.side), Image.Resampling.BICUBIC)
        patch.save(folder / f"{number:05d}.png")


if __name__ == "__main__":
    main()
