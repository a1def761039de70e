"""``python -m zimgkit.training``."""

from zimgkit.training.cli import main

if __name__ == "__main__":
    main()
