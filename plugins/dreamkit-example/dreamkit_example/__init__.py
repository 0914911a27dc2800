"""An example of an installable dreamkit plugin. ``dreamkit_example.hooks`` is its entry point."""
