"""``make bench-gpu``: see ``side_by_side.py``.

Four workers share the GPU at 25 % of its SMs each; the winners of both sides are measured on the whole GPU.
"""

from side_by_side import compare

if __name__ == "__main__":
    compare("cuda", ["--sm-percent", "25", "--workers", "4"])
