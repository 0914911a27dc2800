"""Latency: timing models on the target, and look-up tables of layers."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_latency_backends(register: Register) -> None:
    """Register the built-in backends."""
    register("torch-cpu", "dreamkit.latency.torch_eager:TorchCPU")
    register("onnxruntime", "dreamkit.latency.onnx_runtime:OnnxRuntime")
    register("torch-cuda", "dreamkit.latency.torch_eager:TorchCUDA")
