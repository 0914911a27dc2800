"""Training: distillation, its losses, and BatchNorm statistics."""
