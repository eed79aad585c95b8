"""`python -m reasoninterp` is the command line."""

from reasoninterp.cli import main

if __name__ == "__main__":
    main()
