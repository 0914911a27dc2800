"""Teachers: models from timm, torchvision, a checkpoint or this package; networks for CIFAR."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_teachers(register: Register) -> None:
    """Register the built-in sources of teachers."""
    register("timm", "dreamkit.teachers.timm:TimmTeacher")
    register("torchvision", "dreamkit.teachers.torchvision:TorchvisionTeacher")
    register("cifar", "dreamkit.teachers.cifar:CifarTeacher")
    register("checkpoint", "dreamkit.teachers.checkpoint:CheckpointTeacher")
    register("bundled", "dreamkit.teachers.bundled:BundledTeacher")
    register("student", "dreamkit.students:SavedStudent")
