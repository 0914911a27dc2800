"""The library: functions on networks in memory, whose results are objects.

The functions are long for their signatures and docstrings. What they share stands in each of them,
so that ``help`` and editors show every keyword with its type.
"""
