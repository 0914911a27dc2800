"""What a network that learns set after set knows of each: accuracy, forgetting, confusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dreamkit.card import Card
from dreamkit.evaluation.accuracy import predict
from dreamkit.joined_images import JoinedImages
from dreamkit.types import Images, RunContext


class Retention:
    """Measures a network on every set of classes that it should know.

    After step n (0 is before the first) the run's metrics have ``step<n>.<set>.accuracy``,
    ``step<n>.combined`` (the mean over the sets, as in the paper's Table 7), ``step<n>.accuracy``
    (over all images) and ``step<n>.forgetting``: how far below the best that it has been a set's
    accuracy is, averaged over the sets that were there before (Chaudhry et al., ECCV 2018). A
    prediction is always among all classes that the network then has.

    Args:
        card: of the network.
        context: the run's.
    """

    def __init__(self, card: Card, context: RunContext) -> None:
        self.card = card
        self.context = context
        self.sets: list[str] = []
        self.classes: dict[str, range] = {}
        self.images: dict[str, Images] = {}
        self.history: list[dict[str, float]] = []
        self.confusion: list[list[int]] = []

    def add(self, name: str, classes: range, images: Images | None) -> None:
        """Add a set that the network should know from now on.

        Args:
            name: of the set.
            classes: the outputs that are its classes.
            images: labelled among all outputs; None where there are none.
        """
        self.sets.append(name)
        self.classes[name] = classes
        if images is not None:
            self.images[name] = images
        elif name not in self.images:
            self.context.log.note(f"no test images of '{name}': how well it is known is not told")

    def measure(self, model: nn.Module, step: int) -> None:
        """Measure the network as it is after a step."""
        if not self.images:
            self.history.append({})
            return
        images = JoinedImages(list(self.images.values()))
        with self.context.log.progress("accuracy on all sets", len(images)) as advance:
            predicted, labels = predict(model, images, self.card, self.context.device, advance)
        right = (predicted == labels).float()
        found = {}
        for name in self.images:
            own = (labels >= self.classes[name].start) & (labels < self.classes[name].stop)
            found[name] = float(right[own].mean())
        numbers = {f"{name}.accuracy": value for name, value in found.items()}
        numbers["accuracy"] = float(right.mean())
        if len(self.images) == len(self.sets):
            numbers["combined"] = sum(found.values()) / len(found)
        old = [name for name in found if any(name in earlier for earlier in self.history)]
        if old:
            lost = [max(e[name] for e in self.history if name in e) - found[name] for name in old]
            numbers["forgetting"] = sum(lost) / len(lost)
        self.history.append(found)
        self.confusion = confusion_matrix(predicted, labels, self._outputs)
        self.context.log.metrics |= {f"step{step}.{name}": value for name, value in numbers.items()}
        self.context.log.record("accuracy after each step", step, numbers)

    @property
    def _outputs(self) -> int:
        return max(classes.stop for classes in self.classes.values())

    def report(self, class_names: Sequence[str] | None) -> None:
        """Add what the last step came to: ``student.*``, and details for the report's page.

        Args:
            class_names: in output order, where they are known.
        """
        if not self.images:
            return
        metrics, last = self.context.log.metrics, len(self.history) - 1
        if "step0.accuracy" in metrics:
            metrics["teacher.accuracy"] = metrics["step0.accuracy"]
        for name in ("accuracy", "combined", "forgetting"):
            if f"step{last}.{name}" in metrics:
                metrics[f"student.{name}"] = metrics[f"step{last}.{name}"]
        names = class_names or [str(number) for number in range(self._outputs)]
        per_class = {
            name: row[number] / sum(row)
            for number, (name, row) in enumerate(zip(names, self.confusion, strict=True))
            if sum(row)
        }
        self.context.log.details["continual"] = {
            "sets": self.sets,
            "steps": self.history,
            "class_names": list(names),
            "per_class_accuracy": per_class,
            "confusion": self.confusion,
        }


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """Return how often each class (row) was taken for each (column).

    Args:
        predicted: (N,) int64, in [0, classes).
        labels: (N,) int64, in [0, classes).
        classes: how many there are.
    """
    counts = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    rows: list[list[int]] = counts.view(classes, classes).tolist()
    return rows
