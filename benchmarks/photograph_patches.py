"""Proxy images that need no download: patches of the two photographs that scikit-learn brings.

    python benchmarks/photograph_patches.py patches --images 3072

A network shows much of what it knows on patches of a single photograph (Asano & Saeed,
arXiv 2112.00725).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images


def write_patches(out: Path, images: int, side: int, seed: int) -> None:
    """Write patches as ``out/photographs/*.png``; a folder that is there has all of them.

    Args:
        out: is made.
        images: how many.
        side: pixels, at most as many as the photographs have (427).
        seed: of where they are cut.
    """
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draws = torch.Generator().manual_seed(seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
        folder = Path(unfinished) / "whole" / "photographs"
        folder.mkdir(parents=True)
        for number in range(images):
            photograph = photographs[number % len(photographs)]
            width, height = photograph.size
            most = min(width, height)
            share, across, down = torch.rand(3, generator=draws).tolist()
            # Sizes are as likely in each octave: a patch is an object as often as a texture.
            cut = round(side * (most / side) ** share)
            left, top = round(across * (width - cut)), round(down * (height - cut))
            patch = photograph.crop((left, top, left + cut, top + cut))
            patch = patch.resize((side, side), Image.Resampling.BICUBIC)
            patch.save(folder / f"{number:05d}.png")
        folder.parent.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder; a proxy's class folder lies in it")
    parser.add_argument("--images", type=int, default=3072)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.images < 1 or not 1 <= options.side <= 427:
        parser.error("--images should be at least 1, and --side between 1 and 427")
    if options.out.exists():
        print(f"error: {options.out} is there already; name another, or delete it", file=sys.stderr)
        sys.exit(2)
    write_patches(options.out, options.images, options.side, options.seed)


if __name__ == "__main__":
    main()
