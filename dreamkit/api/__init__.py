"""The library: functions on networks in memory, whose results are objects."""
