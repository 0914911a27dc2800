"""scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, import_extra
from dreamkit.types import Images, StoredImages

SIZE = (1, 8, 8)
TEST_FRACTION = 0.3
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Real handwritten digits, 8×8, bundled with scikit-learn: 70 % train, 30 % held out.

    The split is stratified and fixed (E. Alpaydin, C. Kaynak, UCI 1998, via scikit-learn).

    Args:
        split: ``test`` is the held-out part, which the bundled teacher never saw.
    """

    split: Literal["train", "test"] = "test"

    def open(self, card: Card) -> Images:
        """Return the split's images.

        Raises:
            DreamkitError: scikit-learn is missing, or the teacher's input is not 1×8×8.
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
        return StoredImages(stored, torch.as_tensor(labels, dtype=torch.int64))
