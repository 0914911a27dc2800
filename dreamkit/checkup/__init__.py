"""What can be done with a teacher, and whether a run's files are whole."""
