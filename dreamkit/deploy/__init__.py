"""Students as files: loaded again, exported."""
