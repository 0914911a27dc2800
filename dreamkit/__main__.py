"""``python -m dreamkit``."""

from dreamkit.cli import main

if __name__ == "__main__":
    main()
