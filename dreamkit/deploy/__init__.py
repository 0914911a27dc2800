"""Exporting students, and holding what was written against them."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_exporters(register: Register) -> None:
    """Register the built-in formats."""
    register("onnx", "dreamkit.deploy.formats:Onnx")
    register("torch-export", "dreamkit.deploy.formats:TorchExport")
    register("torchscript", "dreamkit.deploy.formats:TorchScript")
