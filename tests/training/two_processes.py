"""One of several processes that train together; the tests start them."""

import sys
from pathlib import Path

from tests.training.test_loop import SETTINGS, Task
from zimgkit.training.loop import train

if __name__ == "__main__":
    train(Task(), Path(sys.argv[1]), SETTINGS)
