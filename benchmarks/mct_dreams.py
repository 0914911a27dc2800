"""Images by Sony's Model Compression Toolkit, in a process of its own: the rival's part of a table.

pip install --target FOLDER 'model-compression-toolkit==2.6.*'
PYTHONPATH=FOLDER python benchmarks/mct_dreams.py network.pt images.pt --size 224 224

``network.pt`` is a module that torch.fx has traced, so that no class of another package is in it.
Nothing of dreamkit is imported: the toolkit needs other versions of what dreamkit needs too.
Everything that is not asked for is the toolkit's default (experimental in 2.6): RAdam at 16,
smoothed and cropped pixels, statistics of BatchNorm layers, the spread of the logits in place of
labels.
"""

from __future__ import annotations

import argparse
import importlib
import random
import time
from pathlib import Path

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("network", type=Path, help="a traced module, by torch.save")
    parser.add_argument("out", type=Path, help="(images, seconds, processor seconds)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, nargs=2, required=True)
    parser.add_argument("--steps", type=int, default=500, help="the toolkit's default is 500")
    parser.add_argument("--normalisation", default="torchvision", help="one that the toolkit names")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    toolkit = importlib.import_module("model_compression_toolkit").data_generation
    # It is what the calling benchmark has written a moment ago.
    network = torch.load(options.network, weights_only=False).eval()
    config = toolkit.get_pytorch_data_generation_config(
        n_iter=options.steps,
        data_gen_batch_size=options.batch,
        image_normalization_type=toolkit.ImageNormalizationType(options.normalisation),
    )
    start, processor = time.perf_counter(), time.process_time()
    images = toolkit.pytorch_data_generation_experimental(
        model=network,
        n_images=options.batch,
        output_image_size=tuple(options.size),
        data_generation_config=config,
    )
    seconds = time.perf_counter() - start
    used = time.process_time() - processor
    torch.save((torch.cat(images).float(), seconds, used), options.out)


if __name__ == "__main__":
    main()
