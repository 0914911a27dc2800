"""The command line: parse, call, print."""

from dreamkit.cli.app import app, main

__all__ = ["app", "main"]
