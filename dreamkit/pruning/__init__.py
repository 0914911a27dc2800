"""Structured pruning: channel groups, surgery, and the choice of what goes."""
