"""INT8 in ONNX Runtime, calibrated on noise, on real images and on dreams, option by option.

    python benchmarks/int8.py --teacher benchmarks/networks/efficientnet_lite0.yaml \\
        --images imagenet/val --class-names wnids.txt --dreams runs/dreams_of_lite0 --evaluate 300

Images that a network is calibrated on are none of those that it is judged on. Agreement is with
float on the real images; so is accuracy. ``seconds`` are the processor's, of all threads, with the
comparison of the files. ``logits`` is the signal-to-noise ratio of the outputs on unseen images of
the kind that was calibrated on. Needs the extra ``onnx``. Other tools are rows too, each in an
environment of its own (see int8_rival.py): calibrated on the same dreams, and their files judged as
dreamkit's are. With ``--weights int4`` all rows have weights of 4 bits.

    python benchmarks/int8.py ... --rivals nncf=envs/nncf/bin/python mct=envs/mct/bin/python
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from given import NETWORK, given_network
from torch import Tensor, nn

import dreamkit
from dreamkit.card import read_class_names
from dreamkit.latency.processor import processor_name
from dreamkit.onnx_model import as_onnx
from dreamkit.quantizers.onnx_runtime import OnnxQuantizer
from dreamkit.quantizers.targets import this_processor
from dreamkit.sources.folder import Folder
from dreamkit.training.batches import drawn
from dreamkit.types import Images, Quantization, QuantizationStep, Quantizer, Teacher

PLAIN: dict[str, Any] = {"bias_correction": False}
ONE_SCALE = {"name": "onnxruntime", "per_channel": False}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "noise": ("noise", PLAIN),
    "noise + bias correction": ("noise", {}),
    "real images": ("real", PLAIN),
    "real images + bias correction": ("real", {}),
    "dreams": ("dreams", PLAIN),
    "dreams + bias correction (the default)": ("dreams", {}),
    "dreams + ranges: mse": ("dreams", {**PLAIN, "ranges": "mse"}),
    "dreams + ranges: logits": ("dreams", {**PLAIN, "ranges": "logits"}),
    "dreams + keep_float: auto": ("dreams", {**PLAIN, "keep_float": "auto"}),
    "dreams + equalise": ("dreams", {**PLAIN, "equalise": True}),
    "dreams + bias correction, equalise": ("dreams", {"equalise": True}),
    "dreams + bias correction, training": ("dreams", {"training": {}}),
    "dreams, one scale for all weights": ("dreams", {**PLAIN, "quantizer": ONE_SCALE}),
    "dreams, one scale, equalise": ("dreams", {**PLAIN, "quantizer": ONE_SCALE, "equalise": True}),
    "dreams, one scale, bias correction": ("dreams", {"quantizer": ONE_SCALE}),
    "dreams, one scale, bias correction, equalise": (
        "dreams",
        {"quantizer": ONE_SCALE, "equalise": True},
    ),
    "dreams, one scale, bias correction, training": (
        "dreams",
        {"quantizer": ONE_SCALE, "training": {}},
    ),
    "dreams + all three, ranges: logits": ("dreams", {"ranges": "logits", "keep_float": "auto"}),
    "dreams, target: vnni": ("dreams", {**PLAIN, "target": "vnni"}),
    "dreams + bias correction, target: vnni": ("dreams", {"target": "vnni"}),
}
QUICK = ("noise", "dreams", "dreams + bias correction (the default)")
RIVALS = {"nncf": "NNCF", "mct": "MCT"}


@dataclasses.dataclass(frozen=True)
class Rival(Quantizer):
    """Another tool, run by the interpreter of its own environment.

    Args:
        tool: as int8_rival.py calls it.
        python: the interpreter.
        network: that is quantised. What ``calibrate`` is given has hooks, and cannot be pickled.
    """

    tool: str
    python: str
    network: nn.Module

    suffix = ".int8.onnx"

    def calibrate(self, step: QuantizationStep) -> Quantization:
        """Let the tool write its file."""
        images = torch.cat(list(step.batches()))
        (step.folder / "network.onnx").write_bytes(as_onnx(step.model, images[:2], any_batch=True))
        torch.save(self.network, step.folder / "network.pt")
        np.save(step.folder / "images.npy", images.numpy())
        script = Path(__file__).with_name("int8_rival.py")
        subprocess.run([self.python, script, self.tool, step.folder], check=True)
        return RivalFile(step.folder)

    def load(
        self, path: Path, threads: int | None = None, exact: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """Return what runs a file: ONNX Runtime, as it does dreamkit's."""
        return OnnxQuantizer().load(path, threads, exact)


@dataclasses.dataclass(frozen=True)
class RivalFile(Quantization):
    """What a rival left.

    Args:
        folder: where.
    """

    folder: Path

    def write(self, path: Path, keep_float: Collection[str] = ()) -> None:
        """Copy the rival's file."""
        path.write_bytes((self.folder / "rival.onnx").read_bytes())

    def write_float(self, path: Path) -> None:
        """Copy the file that the rival was given."""
        path.write_bytes((self.folder / "network.onnx").read_bytes())

    def describe(self) -> dict[str, Any]:
        """Return the rival's version."""
        told: dict[str, Any] = json.loads((self.folder / "rival.json").read_text(encoding="utf-8"))
        return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="bundled:digits_resnet8", help=NETWORK)
    parser.add_argument("--images", type=Path, help="real ones, a folder a class; else digits")
    parser.add_argument("--resize", type=float, default=1.143, help="as of the source folder")
    parser.add_argument("--class-names", type=Path, help="names of the folders, in output order")
    parser.add_argument("--dreams", type=Path, help="images dreamed before: a folder of pictures")
    parser.add_argument("--calibrate", type=int, default=64, help="images")
    parser.add_argument("--evaluate", type=int, default=300, help="real images")
    parser.add_argument("--weights", choices=("int8", "int4"), default="int8")
    parser.add_argument(
        "--training", type=int, default=200, metavar="STEPS", help="of rows with it"
    )
    parser.add_argument("--lr", type=float, default=1e-4, help="of rows with training")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--rivals", nargs="+", default=[], metavar="TOOL=PYTHON", help=f"of {', '.join(RIVALS)}"
    )
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch's and of the rows' work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three rows")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    rivals = dict(text.partition("=")[::2] for text in options.rivals)
    if not all(rivals.values()) or not rivals.keys() <= RIVALS.keys():
        parser.error(f"--rivals: TOOL=PYTHON with a tool of {', '.join(RIVALS)}")
    torch.set_num_threads(options.threads)
    teacher = given_network(options.teacher)
    if options.class_names is not None:
        names = read_class_names(options.class_names)
        teacher = dataclasses.replace(
            teacher, card=dataclasses.replace(teacher.card, class_names=names)
        )
    sets, evaluation = _images(teacher, options)
    rows = {name: ROWS[name] for name in (QUICK if options.quick else options.rows)}
    for tool, python in rivals.items():
        settings = {"quantizer": Rival(tool, python, teacher.model)}
        rows[f"{RIVALS[tool]}, dreams"] = ("dreams", settings)
    figures = {}
    for name, (kind, settings) in rows.items():
        figures[name] = _row(teacher, sets, kind, settings, evaluation, options)
        print(f"{name}: {figures[name]}", flush=True)
    _publish(teacher, figures, options)


def _images(
    teacher: Teacher, options: argparse.Namespace
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Return the images of each kind, and the real ones that are judged on, with labels."""
    draws = torch.Generator().manual_seed(options.seed)
    real: Images
    if options.images is not None:
        real = Folder(str(options.images), resize=options.resize).open(teacher.card)
    else:
        from dreamkit.sources.digits import Digits

        real = Digits().open(teacher.card)
    some = drawn(real, options.evaluate + 2 * options.calibrate, draws)
    stored, labels = some.batch(range(len(some)))
    dreams: Any = options.dreams
    if dreams is None:
        flip = teacher.card.input_size[0] == 3
        dreams = dreamkit.invert(
            teacher, 2 * options.calibrate, flip=flip, seed=options.seed, progress=False
        )
    noise = torch.randint(256, (2 * options.calibrate, *teacher.card.input_size), generator=draws)
    sets = {"noise": noise.byte(), "real": stored[options.evaluate :], "dreams": dreams}
    return sets, (stored[: options.evaluate], labels[: options.evaluate])


def _row(
    teacher: Teacher,
    sets: dict[str, Any],
    kind: str,
    settings: dict[str, Any],
    evaluation: tuple[Tensor, Tensor],
    options: argparse.Namespace,
) -> dict[str, Any]:
    if "training" in settings:
        settings = {**settings, "training": {"steps": options.training, "lr": options.lr}}
    if not isinstance(settings.get("quantizer"), Quantizer):
        settings = {**settings, "weights": options.weights}
    start, wall = _processor_seconds(), time.perf_counter()
    made = dreamkit.quantize(
        teacher,
        sets[kind],
        calibration_images=options.calibrate,
        evaluation=evaluation,
        latency_batches=[1],
        max_disagreement=1.0,
        seed=options.seed,
        progress=False,
        device="cpu",
        **settings,
    )
    return {
        **made.metrics,
        "kept_float": made.about["kept_float"],
        "quantization": {
            name: told for name, told in made.about["quantization"].items() if name != "ranges"
        },
        "processor_seconds": _processor_seconds() - start,
        "seconds": time.perf_counter() - wall,
    }


def _processor_seconds() -> float:
    """Return those of this process and of those that it waited for."""
    return sum(os.times()[:4])


def _publish(
    teacher: Teacher, figures: dict[str, dict[str, Any]], options: argparse.Namespace
) -> None:
    """Print the table below what it was measured on."""
    first = next(iter(figures.values()))
    print(
        f"\n{teacher.card.name}, float {first['teacher.accuracy']:.3f} on {options.evaluate} "
        f"images, {first['float.bytes'] / 1e6:.2f} MB; calibrated on {options.calibrate}; seed "
        f"{options.seed}; {processor_name()}, "
        f"{'with' if this_processor().has_vnni else 'without'} VNNI; onnxruntime "
        f"{onnxruntime.__version__}, torch {torch.__version__}\n"
    )
    print(
        "| calibrated on | accuracy | agreement | logits, dB | MB | ms, float / int8 | in float |"
        " processor s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, found in figures.items():
        print(
            f"| {name} | {found['int8.accuracy']:.3f} | {found['int8.evaluation_agreement']:.3f} | "
            f"{found['int8.logits_snr_db']:.1f} | {found['int8.bytes'] / 1e6:.2f} | "
            f"{found['float.latency_ms']:.3g} / {found['int8.latency_ms']:.3g} | "
            f"{len(found['kept_float'])} | {found['processor_seconds']:.0f} |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
