"""Losses: of distillation, and the terms of learning new classes."""

from dreamkit.registry import Register, hookimpl


@hookimpl
def register_losses(register: Register) -> None:
    """Register the built-in losses of learning new classes."""
    room = "dreamkit.training.losses"
    register("replay_distillation", f"{room}.replay_distillation:ReplayDistillation")
    register("replay_cross_entropy", f"{room}.replay_cross_entropy:ReplayCrossEntropy")
    register("cross_entropy", f"{room}.cross_entropy:CrossEntropy")
    register("local_cross_entropy", f"{room}.local_cross_entropy:LocalCrossEntropy")
    register("old_distillation", f"{room}.old_distillation:OldDistillation")
    register("feature_distillation", f"{room}.feature_distillation:FeatureDistillation")
    register("head_cross_entropy", f"{room}.head_cross_entropy:HeadCrossEntropy")
    register("lwf_mc", f"{room}.lwf_mc:LwFMC")


@hookimpl
def register_distillation_losses(register: Register) -> None:
    """Register the built-in losses between a student and its teacher."""
    room = "dreamkit.training.losses"
    register("kl", f"{room}.distillation:KLDivergence")
    register("l1", f"{room}.distillation:LogitDistance")
