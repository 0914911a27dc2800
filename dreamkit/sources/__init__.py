"""Sources: where images come from, for training and for evaluation alike."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_sources(register: Register) -> None:
    """Register the built-in sources."""
    register("dreams", "dreamkit.store.source:Dreams")
    register("folder", "dreamkit.sources.folder:Folder")
    register("torchvision", "dreamkit.sources.torchvision:TorchvisionDataset")
    register("digits", "dreamkit.sources.digits:Digits")
    register("generator", "dreamkit.sources.generator:GeneratorImages")
    register("joined", "dreamkit.sources.joined:Joined")
