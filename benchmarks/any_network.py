"""Take in and look over every network of timm that builds quickly, with random weights.

Writes a row a network: seconds, whether it can be inverted, how much of it can be pruned, and why
not. Given again, the command goes on with what is missing.

    python benchmarks/any_network.py --out any_network.csv --families
    python benchmarks/any_network.py --out any_network.csv --shard 0/4
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

BUILT_IN_SECONDS = 10
SMALL = 64


@dataclass
class Row:
    """What became of one network.

    Args:
        model: of timm.
        outcome: ``done``, ``refused``, ``slow to build``, ``not built``, ``out of time`` or
            ``traceback``.
        seconds: for all, the start of the process left out.
        size: of its images.
        inverted: whether it can be.
        groups: of channels that can be pruned.
        left_alone: groups that cannot.
        reason: why it was refused, or cannot be inverted, or the traceback.
    """

    model: str
    outcome: str
    seconds: float = 0.0
    size: int = 0
    inverted: bool = False
    groups: int = 0
    left_alone: int = 0
    reason: str = ""


def look_at(model: str) -> Row:
    """Build one network, take it in and diagnose it."""
    import timm
    import torch

    from dreamkit.card import Card
    from dreamkit.checkup.doctor import diagnose
    from dreamkit.errors import DreamkitError
    from dreamkit.types import Teacher

    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        network, size = _smallest(timm, model)
    except Exception as error:  # timm asks for packages that may not be there
        return Row(model, "not built", reason=f"{type(error).__name__}: {error}")
    if time.monotonic() - start > BUILT_IN_SECONDS:
        return Row(model, "slow to build", time.monotonic() - start)
    channels = network.pretrained_cfg.get("input_size", (3,))[0]
    classes = int(network.num_classes)
    mean = (0.5,) * channels
    card = Card(f"timm/{model}", (channels, size, size), mean, mean, classes, "random weights")
    row = Row(model, "done", size=size)
    try:
        found = diagnose(Teacher(network.eval(), card, {}), torch.device("cpu"), 2)
        row.inverted, row.reason = found.inversion is not None, found.uninvertible or ""
        row.groups, row.left_alone = len(found.groups), len(found.skipped)
        if found.unprunable is not None:
            row.reason += f" pruning: {found.unprunable}"
    except DreamkitError as error:
        row.outcome, row.reason = "refused", error.message
    except Exception:
        row.outcome, row.reason = "traceback", traceback.format_exc()
    row.seconds = round(time.monotonic() - start, 1)
    return row


def _smallest(timm: Any, model: str) -> tuple[Any, int]:
    """Return a network at a small size, or else at its own, and the size."""
    import torch

    config = timm.get_pretrained_cfg(model)
    own = config.input_size[1] if config is not None else 224
    if config is not None and config.fixed_input_size:
        return timm.create_model(model), own
    least = SMALL if config is None or config.min_input_size is None else config.min_input_size[1]
    network, size = timm.create_model(model).eval(), min(max(SMALL, least), own)
    channels = network.pretrained_cfg.get("input_size", (3,))[0]
    try:
        with torch.no_grad():
            network(torch.zeros(2, channels, size, size))
    except Exception:  # it is too small for all of its layers
        size = own
    return network, size


def _child(model: str, limit_seconds: float) -> Row:
    command = [sys.executable, __file__, "--one", model]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return Row(model, "out of time", limit_seconds)
    try:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return Row(model, "traceback", reason=f"status {done.returncode}: {done.stderr[-2000:]}")


def models_to_look_at(families: bool) -> list[str]:
    """Return timm's networks, or the first of each of its modules alone."""
    import timm

    if not families:
        return timm.list_models()
    first = (timm.list_models(module=module)[:1] for module in timm.list_modules())
    return [model for models in first for model in models]


def read_rows(path: Path) -> dict[str, Row]:
    """Return what a file has, by model."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        found = [
            Row(row["model"], row["outcome"], reason=row["reason"]) for row in csv.DictReader(file)
        ]
    return {row.model: row for row in found}


def look_over(models: Sequence[str], path: Path, limit_seconds: float) -> dict[str, Row]:
    """Look at networks that a file lacks, adding a line for each; return all rows of the file."""
    rows = read_rows(path)
    names = [field.name for field in fields(Row)]
    for model in models:
        if model in rows:
            continue
        rows[model] = row = _child(model, limit_seconds)
        fresh = not path.is_file()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            if fresh:
                writer.writeheader()
            writer.writerow(asdict(row))
        print(f"{model}: {row.outcome}, {row.seconds} s {row.reason.strip()[-100:]}", flush=True)
    return rows


def main() -> None:
    """Look at what is asked for, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("any_network.csv"))
    parser.add_argument("--families", action="store_true", help="one of each family alone")
    parser.add_argument("--shard", default="0/1", help="the I-th of N parts: I/N")
    parser.add_argument("--limit-seconds", type=float, default=120, help="for one network")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(look_at(options.one))))
        return
    part, parts = map(int, options.shard.split("/"))
    models = models_to_look_at(options.families)[part::parts]
    rows = look_over(models, options.out, options.limit_seconds)
    for outcome, number in Counter(row.outcome for row in rows.values()).most_common():
        print(f"{outcome}: {number}")


if __name__ == "__main__":
    main()
