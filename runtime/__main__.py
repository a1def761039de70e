"""``python -m zimgkit.runtime`` is ``zimg-run``."""

from zimgkit.runtime.commands.cli import main

if __name__ == "__main__":
    main()
