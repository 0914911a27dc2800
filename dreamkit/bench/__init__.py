"""Measuring what there is on this machine: teachers, and tables of layers' latencies."""
