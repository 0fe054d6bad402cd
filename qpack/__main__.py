"""``python -m qpack`` is the ``qpack`` program."""

from qpack.cli import main

if __name__ == "__main__":
    main()
