"""Evaluation: accuracy, agreement, and what a model costs."""
