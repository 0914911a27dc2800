"""Networks in integers: ranges of activations, corrections without data, and files."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_quantizers(register: Register) -> None:
    """Register the built-in quantizers."""
    register("onnxruntime", "dreamkit.quantizers.onnx_runtime:OnnxQuantizer")
    register("onnxruntime_dynamic", "dreamkit.quantizers.onnx_dynamic:OnnxDynamicQuantizer")
