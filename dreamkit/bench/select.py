"""Which teachers are measured, and what their figures will hold for."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from dreamkit.bench.results import Settings
from dreamkit.devices import choose_device, default_backend
from dreamkit.errors import DreamkitError, did_you_mean
from dreamkit.registry import Registries
from dreamkit.teachers.named import Weights, listing_source


def select(
    registries: Registries,
    sources: Sequence[str],
    globs: Sequence[str],
    weights: Weights,
    limit: int | None = None,
) -> list[tuple[str, str]]:
    """Return source and model of every teacher that a glob matches, in the order of its source.

    Args:
        registries: where sources stand.
        sources: entries of ``teachers``.
        globs: shell patterns of models; none is all. One with a dot is held against pretrained
            tags too.
        weights: with ``default``, only models that have weights.
        limit: at most so many, from the front.

    Raises:
        DreamkitError: a source is unknown, has no list of models or none with weights, or a glob
            matches none.
    """
    known = {
        source: listing_source(registries, source).known_models(weights == "default")
        for source in dict.fromkeys(sources)
    }
    names = [name for listed in known.values() for name in listed]
    if not names:
        raise DreamkitError(
            f"no model of {', '.join(known)} comes with weights; --weights null measures what they "
            "cost with random ones"
        )
    for glob in globs:
        if not any(_matches(name, glob) for name in names):
            raise DreamkitError(
                f"no model of {', '.join(known)} matches '{glob}'{did_you_mean(glob, names)}"
            )
    chosen = [
        (source, name)
        for source, listed in known.items()
        for name in dict.fromkeys(listed)
        if any(_matches(name, glob) for glob in globs or ["*"])
    ]
    return chosen[:limit]


def _matches(name: str, glob: str) -> bool:
    # timm's tags name one architecture's weights, of which a sweep wants the default alone.
    return fnmatch.fnmatchcase(name, glob) and ("." in glob or "." not in name)


def resolve_settings(
    registries: Registries,
    weights: Weights,
    batch_size: int,
    steps: int,
    verifier: str | None,
    device: str,
) -> Settings:
    """Choose the device, and note what the figures hold for.

    Raises:
        DreamkitError: torch does not see the device, or there are no dreams for a verifier.
    """
    if verifier is not None and weights == "null":
        raise DreamkitError(
            "--verifier judges dreams, and those of random weights show nothing: leave it out, or "
            "--weights null"
        )
    place = choose_device(device)
    machine = default_backend(registries, place).describe()
    return Settings(weights, batch_size, steps, verifier, str(place), machine)
