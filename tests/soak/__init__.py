"""Load and swaps on a running server, and whether every answer was right: ``python -m soak``, tests/ on the path."""
