"""Entry point of `python -m fed`."""

from fed.cli import main

if __name__ == "__main__":
    main()
