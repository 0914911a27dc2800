"""scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, import_extra
from dreamkit.sources.classes import outputs_of, taken
from dreamkit.types import NO_LABEL, Images, ImageSource, StoredImages

SIZE = (1, 8, 8)
NAMES = tuple("0123456789")
TEST_FRACTION = 0.3
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits(ImageSource):
    """Real handwritten digits, 8×8, bundled with scikit-learn: 70 % train, 30 % held out.

    The split is stratified and fixed (E. Alpaydin, C. Kaynak, UCI 1998, via scikit-learn).

    Args:
        split: ``test`` is the held-out part, which the bundled teachers never saw.
        classes: the digits to take; null takes all.
    """

    split: Literal["train", "test"] = "test"
    classes: tuple[Annotated[int, Field(ge=0, le=9)], ...] | None = None

    def class_names(self) -> tuple[str, ...]:
        """Return the digits, in order."""
        return tuple(NAMES[number] for number in taken(NAMES, self.classes, "digits"))

    def open(self, card: Card) -> Images:
        """Return the split's images.

        Raises:
            DreamkitError: scikit-learn is missing, or the teacher's input is not 1×8×8, or its
                classes are others.
        """
        if card.input_size != SIZE:
            raise DreamkitError(f"digits are {SIZE}, {card.name} takes {card.input_size}")
        data = import_extra("sklearn.datasets", "demo").load_digits()
        selection = import_extra("sklearn.model_selection", "demo")
        parts = selection.train_test_split(
            data.images,
            data.target,
            test_size=TEST_FRACTION,
            random_state=_SPLIT_SEED,
            stratify=data.target,
        )
        images, labels = parts[self.split == "test"], parts[2 + (self.split == "test")]
        stored = (torch.as_tensor(images) * 255 / 16).round().to(torch.uint8).unsqueeze(1)
        outputs = torch.full((len(NAMES),), NO_LABEL)
        numbers = taken(NAMES, self.classes, "digits")
        matched = outputs_of(self.class_names(), card, "digits", self.classes is not None)
        outputs[numbers] = torch.tensor(matched.outputs)
        mapped = outputs[torch.as_tensor(labels, dtype=torch.int64)]
        there = mapped != NO_LABEL
        notes = () if matched.note is None else (matched.note,)
        return StoredImages(stored[there], mapped[there], notes=notes)
