"""What a network that has learnt new classes states of all it knows, for the next dreams."""

from __future__ import annotations

from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.bn_refresh import refresh
from dreamkit.training.statistics import Statistics
from dreamkit.types import Images, RunContext, Teacher


def refresh_statistics(
    how: Statistics,
    old: Teacher,
    new: Teacher,
    replay: Images,
    added: Images,
    batch_size: int,
    context: RunContext,
) -> None:
    """Let BatchNorm state what it is given of old and new classes, each class as much.

    Args:
        how: what is told of the old ones: by ``difference`` from what the old network states, or
            what is seen of ``replay``; ``keep`` does nothing.
        old: the network before it learnt them.
        new: the network after that; it computes what it did.
        replay: what stands for images of the old classes.
        added: images of the new classes.
        batch_size: images at once.
        context: the run's.
    """
    if how == "keep":
        return
    card, device = new.card, context.device
    before = NormalisedBatches(replay, card, device, batch_size)
    news = NormalisedBatches(added, card, device, batch_size)
    network = old.model if how == "difference" else None
    passes = len(before) + len(news) + (0 if network is None else len(before))
    share = old.card.num_classes / card.num_classes
    with context.log.progress("statistics", passes) as advance:
        refresh(new.model, network, before, news, share, advance)
