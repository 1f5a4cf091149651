"""``make bench-cpu``: see ``side_by_side.py``."""

from side_by_side import STOCK_EVALUATOR, Side, compare
from tasks import extract

if __name__ == "__main__":
    compare("cpu", extract, [Side("own"), Side("stock evaluator", evaluator=STOCK_EVALUATOR)])
