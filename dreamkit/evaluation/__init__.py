"""Evaluation: accuracy, agreement, what a model costs, and what images are worth."""
