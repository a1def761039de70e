"""``python -m zimg.training``."""

from zimg.training.cli import main

if __name__ == "__main__":
    main()
