"""`python -m foretaste` is the command `foretaste`."""

from foretaste.cli.main import run

if __name__ == "__main__":
    run()
