"""``make bench-cpu``: see ``side_by_side.py``."""

from side_by_side import compare

if __name__ == "__main__":
    compare("cpu")
