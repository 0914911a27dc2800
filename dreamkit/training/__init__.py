"""Training: distillation, its losses, and BatchNorm recalibration."""
