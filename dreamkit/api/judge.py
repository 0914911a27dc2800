"""Ask other networks in memory what they see in images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dreamkit.api.given_images import GivenImages, ImagesLike
from dreamkit.api.networks import GivenNetwork, View, take_in
from dreamkit.api.results import Judgement, described
from dreamkit.api.session import Conditions, session
from dreamkit.api.students import ToDream, run_application
from dreamkit.errors import DreamkitError
from dreamkit.types import Teacher


def judge(
    model: nn.Module | Teacher,
    images: ImagesLike | None = None,
    verifiers: Mapping[str, nn.Module | Teacher] | None = None,
    *,
    reference: ImagesLike | None = None,
    synthesis: ToDream | None = None,
    size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool | None = None,
    out: str | Path | None = None,
    evaluation: ImagesLike | None = None,
    allow_foreign: bool = False,
    **options: Any,
) -> Judgement:
    """Ask networks that took no part in dreams what they see in them.

    DeepInversion (Yin et al., CVPR 2020), Tables 2 and 3. The inverted network sees in its dreams
    what it was asked to; whether others do tells if they show the classes or only its weaknesses.

    Args:
        model: that the dreams came from.
        images: labelled, as of ``prune``; 1,024 are dreamed where there are none.
        verifiers: networks by name, with the same classes in the same order; never ``model``.
            Those that do not tell it are taken to see images as ``model`` does.
        reference: real images, for the Fréchet distance.
        synthesis: how images are dreamed, options of ``invert``, or a list of them for several.
        size: as of ``invert``, and so are ``mean``, ``std``, ``class_names``, ``seed``, ``device``
            and ``progress``.
        mean: per channel.
        std: per channel.
        class_names: in output order.
        seed: of everything random.
        device: where to work.
        progress: show notes and a bar.
        out: a folder that keeps finished batches of dreams.
        evaluation: labelled images to report the network's accuracy on.
        allow_foreign: take dreams of another network as ``images``.
        **options: of the application, as in a recipe (``dreamkit show applications judge``), e.g.
            ``splits=5, layer="fc"``.

    Returns:
        ``metrics`` has ``judge.<name>.accuracy`` and the rest, ``verifiers`` what each one is.

    Raises:
        DreamkitError: a network, the images or an option cannot be used; the message names it.
    """
    conditions = Conditions(
        View(size, mean, std, class_names), seed, device, progress, out, evaluation
    )
    with session(model, conditions) as work:
        card = work.teacher.card
        if not isinstance(verifiers or {}, Mapping):
            raise DreamkitError(
                "verifiers: should be networks by name, such as {'resnet18': network}, not "
                f"{type(verifiers).__name__}"
            )
        networks = []
        for name, network in (verifiers or {}).items():
            # One that does not tell how it sees images is taken to see them as the teacher does.
            taken = take_in(network, View(), work.log.note, f"verifiers: {name}", card, judge=True)
            named = dataclasses.replace(taken.card, name=name)
            networks.append(GivenNetwork(dataclasses.replace(taken, card=named)))
        given: dict[str, Any] = {"verifiers": networks, **options}
        if images is not None:
            given["images"] = GivenImages(images, "images")
        if reference is not None:
            given["reference"] = GivenImages(reference, "reference")
        hashed = [network.teacher.card.weights_sha256 for network in networks]
        _, settings = run_application(
            work,
            "judge",
            given,
            images,
            synthesis,
            hashed,
            function=judge,
            allow_foreign=allow_foreign,
        )
        told = work.log.details["judge"]["verifiers"]
        return Judgement(verifiers=told, **described(work, settings))
