"""Images of several sources as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, OptionError, placed
from dreamkit.joined_images import JoinedImages, lacks_labels
from dreamkit.registry import EntriesOf
from dreamkit.types import Images, ImageSource


@dataclass(frozen=True)
class Joined(ImageSource):
    """Several sources as one, such as the dreams of two synthesizers.

    What a few good images teach and what many cheap ones do adds up. Where some have no labels,
    those of the others are not used.

    Args:
        of: the sources; each image of each counts once.
    """

    of: Annotated[tuple[ImageSource, ...], EntriesOf("sources")]

    def __post_init__(self) -> None:
        if not self.of:
            raise OptionError("of", "give at least one source")

    def open(self, card: Card) -> Images:
        """Return the images of all, one source after the other.

        Raises:
            DreamkitError: of a source, placed at it; images of another size than the first's.
        """
        parts: list[Images] = []
        size = None
        for number, source in enumerate(self.of):
            with placed("of", number):
                images = source.open(card)
                parts.append(images)
                if len(images) == 0:
                    continue
                own = tuple(images.batch([0])[0].shape[1:])
                size = size or own
                if own != size:
                    raise DreamkitError(f"these images are {own}, those before them {size}")
        bare = [number for number, part in enumerate(parts) if len(part) and lacks_labels(part)]
        if not bare or len(bare) == len([part for part in parts if len(part)]):
            return JoinedImages(parts)
        note = f"the images of 'of[{bare[0]}]' have no labels: those of the others are not used"
        return JoinedImages(parts, labelled=False, told=(note,))
