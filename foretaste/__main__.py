"""`python -m foretaste` is the command `foretaste`."""

from foretaste.cli.main import run

run()
