"""`python -m streams` is the `mimstream` command."""

from streams.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
