"""Tables 4 and 5 of DeepInversion: pruning with images from here and there, and for hardware.

    python benchmarks/pruning_tables.py --set 'evaluation={source: folder, path: cifar10/test}'
    python benchmarks/pruning_tables.py --original cifar10/train --proxy svhn/train --seed 0 1 2
    python benchmarks/photograph_patches.py patches    # --proxy patches, without a download
    python benchmarks/pruning_tables.py --tables 5 --eta 0.03 0.1 0.3 1
    python benchmarks/pruning_tables.py --quick    # the mechanics

Every cell is a run of ``pruning_tables.yaml``, beside this file, under --out, shared by both
tables; finished ones are read, not repeated, and interrupted ones go on. ``--set`` changes all of
them (as of ``dreamkit run``). Rows that need --original or --proxy are left out without. Without
--generator its row has the images of recipes/cifar10/fast_meta.yaml, whose generator the teacher
alone trains: as many as that recipe's preset makes, all of ``--set`` but ``synthesis``. In table 4
channels are ranked by Taylor importance alone; "no fine-tuning" is what pruning on DeepInversion's
dreams left, and "reconstructed" the same fitted by least squares. DeepInversion dreams once per
seed, as many images as ADI, for all the rows that use them. Table 5's latencies are measured in the
end, of all its networks in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from recipe_runs import RECIPES, add_budget, publish, run_recipe, spread
from rich.console import Console

from dreamkit.errors import DreamkitError
from dreamkit.latency.torch_eager import TorchCPU
from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe
from dreamkit.store.artifact import read_artifact
from dreamkit.students import load_student, load_unpruned

RECIPE = Path(__file__).with_suffix(".yaml")
GENERATOR = RECIPES / "cifar10" / "fast_meta.yaml"
RATIOS = (0.29, 0.63)
"""FLOPs left in the paper's table 4: -71 % and -37 %."""
PAPER_4 = {
    # Yin et al., CVPR 2020, Table 4: ResNet-50, top-1 after -71 % and -37 % FLOPs.
    "no fine-tuning": (1.9, 16.6),
    "partial original": (69.8, 74.9),
    "proxy": (66.0, 73.8),
    "generator": (63.0, 73.7),  # BigGAN
    "fast_meta": (63.0, 73.7),
    "deepinversion": (55.9, 72.0),
    "adaptive": (60.7, 73.3),
}
PAPER_5 = {
    # Table 5: ResNet-50 at -20 % of its filters: GFLOPs, ms, top-1.
    "teacher": (4.1, 4.90, 76.1),
    "Taylor": (2.7, 4.38, 75.5),
    "HA": (3.1, 4.24, 76.1),
    "ADI": (2.7, 4.36, 73.3),
    "ADI + HA": (2.9, 4.22, 74.0),
}
RUNS = 5
"""Times that table 5's networks are timed in turn, of which each one's middle counts."""
SEED = "%seed%"
"""Stands in a cell for the seed of its run."""
DREAMED = "application={name: synthesize}"
PLAIN = "synthesis.regularizers=[{name: bn_feature, weight: 30}]"
GENERATOR_TERMS = "synthesis.regularizers=[{name: bn_feature, form: paper, weight: 10}]"
"""Those of the generator's recipe, but for the one that needs a student."""


@dataclass
class Cell:
    """One run: what it is called, and what it changes of the recipe."""

    name: str
    changes: list[str]
    recipe: Path = RECIPE


def pruning(images: str, changes: list[str], ratio: float, eta: float = 0.0) -> Cell:
    """Return the run that prunes to a share of the FLOPs.

    Args:
        images: what the images are called that it ranks and recovers on.
        changes: what makes a recipe use them.
        ratio: the share.
        eta: η of eq. 10; 0 is Taylor importance alone.
    """
    criteria = "{name: taylor, weight: 1, squares: batch}"
    if eta:
        criteria += f", {{name: latency_lut, weight: {eta}}}"
    target = f"application.target={{flops: {ratio}}}"
    name = f"{images.replace(' ', '_')}-{ratio}-eta{eta:g}"
    return Cell(name, [f"application.criteria=[{criteria}]", target, *changes])


class Tables:
    """The runs of both tables.

    Args:
        options: from the command line.
        console: where progress is shown.
    """

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options = options
        self.console = console

    def run(self, cell: Cell) -> list[dict[str, float]]:
        """Run a cell with every seed; return the metrics of each."""
        found = []
        for seed in self.options.seed:
            changes = [change.replace(SEED, str(seed)) for change in cell.changes]
            folder = self.folder(cell, seed)
            # What is set of DeepInversion's synthesis means nothing to another's.
            own = cell.recipe == RECIPE
            general = [c for c in self.options.changes if own or not c.startswith("synthesis")]
            changes = [*general, *changes, f"seed={seed}"]
            metrics, _ = run_recipe(cell.recipe, self.options.preset, changes, folder, self.console)
            found.append(metrics)
        return found

    def folder(self, cell: Cell, seed: int) -> Path:
        """Return where a cell's run with a seed lies."""
        path: Path = self.options.out / f"{cell.name}-{self.options.preset}-{seed}"
        return path

    def timed_together(self, cells: Mapping[str, Cell]) -> dict[str, list[float]]:
        """Time the students of some cells and their teacher in turn; return ms, one a seed."""
        loaded = read_recipe(RECIPE, build_registries, self.options.preset, self.options.changes)
        backend = loaded.recipe.latency or TorchCPU()
        found: dict[str, list[float]] = {name: [] for name in ("teacher", *cells)}
        for seed in self.options.seed:
            students = [self.folder(cell, seed) / "student" for cell in cells.values()]
            models = [load_unpruned(students[0]), *[load_student(path) for path in students]]
            size = read_artifact(students[0]).card.input_size
            image = torch.zeros(backend.batch_size, *size)
            runs = [backend.time([(model, image) for model in models]) for _ in range(RUNS)]
            for times, own in zip(found.values(), zip(*runs, strict=True), strict=True):
                times.append(median(timing.median_ms for timing in own))
        return found

    def deepinversion(self) -> list[str]:
        """Return what makes a recipe prune on DeepInversion's dreams; dream them if need be."""
        return self.dreamed(Cell("deepinversion", [DREAMED, PLAIN]))

    def dreamed(self, cell: Cell) -> list[str]:
        """Return what makes a recipe prune on a cell's dreams; dream them if need be."""
        self.run(cell)
        folder = self.options.out / f"{cell.name}-{self.options.preset}-{SEED}" / "dreams"
        return given(f"{{source: dreams, path: {folder}}}")

    def sources(self) -> dict[str, list[str]]:
        """Return what each source of images changes of the recipe."""
        options, known = self.options, {}
        for name, path in (("partial original", options.original), ("proxy", options.proxy)):
            if path is not None:
                known[name] = folder(path)
        if options.generator is None:
            made = Cell("fast_meta", [DREAMED, GENERATOR_TERMS], GENERATOR)
            known["fast_meta"] = self.dreamed(made)
        else:
            known["generator"] = given(
                f"{{source: generator, path: {options.generator}, "
                f"images: {options.generated or 3072}, latent: {options.latent or [128]}}}"
            )
        known["deepinversion"] = self.deepinversion()
        return known if options.without_adaptive else known | {"adaptive": []}

    def table4(self) -> tuple[str, dict[str, list[list[dict[str, float]]]]]:
        """Return the table of image sources as Markdown, and its metrics by row and ratio."""
        results: dict[str, list[list[dict[str, float]]]] = {}
        for source, changes in self.sources().items():
            results[source] = [
                self.run(pruning(source, changes, ratio)) for ratio in self.options.ratios
            ]
        lines = [
            "| images | "
            + " | ".join(f"{ratio:.0%} of the FLOPs: accuracy, %" for ratio in self.options.ratios)
            + " | paper, 29 % | paper, 63 % |",
            "|---" * (3 + len(self.options.ratios)) + "|",
        ]
        rows = {
            "no fine-tuning": (results["deepinversion"], "cut.accuracy"),
            "reconstructed": (results["deepinversion"], "pruned.accuracy"),
        }
        rows |= {source: (cells, "student.accuracy") for source, cells in results.items()}
        for name, (cells, key) in rows.items():
            shown = [spread([100 * m[key] for m in runs if key in m], 2) for runs in cells]
            paper = [f"{value:.1f}" for value in PAPER_4[name]] if name in PAPER_4 else ["", ""]
            lines.append("| " + " | ".join([name, *shown, *paper]) + " |")
        return "\n".join(lines), results

    def table5(self) -> tuple[str, dict[str, list[dict[str, float]]]]:
        """Return the hardware-aware table as Markdown, and its metrics by row."""
        ratio, original = self.options.ratio, self.options.original
        given_images = (
            ("deepinversion", self.deepinversion())
            if original is None
            else ("partial original", folder(original))
        )
        sources = {"": given_images}
        if not self.options.without_adaptive:
            sources["ADI + "] = ("adaptive", [])
        cells = {}
        for prefix, (images, changes) in sources.items():
            cells[(prefix or "Taylor").removesuffix(" + ")] = pruning(images, changes, ratio)
            for eta in self.options.eta:
                cells[f"{prefix}HA, η {eta}"] = pruning(images, changes, ratio, eta)
        results = {name: self.run(cell) for name, cell in cells.items()}
        lines = [
            "| pruned by | MFLOPs | measured latency, ms | of its teacher's | accuracy, % "
            "| paper: GFLOPs | ms | top-1, % |",
            "|---|---|---|---|---|---|---|---|",
        ]
        times = self.timed_together(cells)
        first = next(iter(results.values()))
        lines.append(row5("teacher", first, "teacher", times))
        lines += [row5(name, runs, "student", times) for name, runs in results.items()]
        return "\n".join(lines), results


def given(source: str) -> list[str]:
    """Return what makes a recipe prune on images that are there, and dream none."""
    return ["application.adaptive=null", "synthesis=null", f"application.images={source}"]


def folder(path: Path) -> list[str]:
    """Return what makes a recipe prune on a folder's images, whatever their classes are."""
    return given(f"{{source: folder, path: {path}, labelled: false}}")


def row5(
    name: str, runs: list[dict[str, float]], model: str, times: Mapping[str, list[float]]
) -> str:
    latency = times[name]
    share = [ms / whole for ms, whole in zip(latency, times["teacher"], strict=True)]
    accuracy = [100 * m[f"{model}.accuracy"] for m in runs if f"{model}.accuracy" in m]
    shown = [
        name,
        spread([m[f"{model}.flops"] / 1e6 for m in runs], 1),
        spread(latency, 3),
        spread(share, 3),
        spread(accuracy, 2),
    ]
    paper = PAPER_5[name.partition(",")[0]]
    return "| " + " | ".join([*shown, *(str(value) for value in paper)]) + " |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tables", type=int, nargs="+", choices=[4, 5], default=[4, 5])
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--ratio", type=float, default=0.5, help="of table 5's FLOPs")
    parser.add_argument("--eta", type=float, nargs="+", default=[0.1])
    parser.add_argument("--original", type=Path, help="class folders of some training images")
    parser.add_argument("--proxy", type=Path, help="class folders of other images")
    parser.add_argument("--generator", type=Path, help="a TorchScript file, a GAN's")
    parser.add_argument("--latent", help="the shape of its noise (default: [128])")
    parser.add_argument("--generated", type=int, help="images drawn from it (default: 3072)")
    parser.add_argument(
        "--without-adaptive", action="store_true", help="leave out ADI, which dreams for each row"
    )
    add_budget(parser, "runs/pruning_tables")
    options = parser.parse_args()
    if options.generator is None and (options.latent or options.generated):
        parser.error("--latent and --generated are about --generator, which is not given")
    if options.quick:
        options.preset = "smoke"
    return options


def main() -> None:
    options = parse()
    tables = Tables(options, Console(stderr=True))
    shown, figures = [], {}
    try:
        for number in options.tables:
            text, results = tables.table4() if number == 4 else tables.table5()
            shown.append(f"Table {number}\n\n{text}")
            figures[f"table{number}"] = results
    except DreamkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    publish(options, "\n\n".join(shown), figures)


if __name__ == "__main__":
    main()
