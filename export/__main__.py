"""``python -m zimgkit.export`` is ``zimg-export``."""

from zimgkit.export.cli.main import main

if __name__ == "__main__":
    main()
