#!/usr/bin/env python3
"""One command for everything: `python dev.py demo`, `test`, `check`, `host`, `bench`, `run`; see `dev.py --help`.

It needs Python 3.10 or newer and nothing else: what a command needs is installed into .venv the first time.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (what ruff takes for granted is asked here)
    sys.exit("Python 3.10 or newer is needed; {} is {}.{}".format(sys.executable, *sys.version_info[:2]))

from dev.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
