"""`python -m cascadevl`: the command, where the environment's scripts are not on the path."""

import sys

from cascadevl.cli.main import program

if __name__ == "__main__":
    sys.exit(program())
