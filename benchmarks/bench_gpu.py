"""``make bench-gpu``: see ``side_by_side.py``.

The service runs three times: four workers that share the GPU at 25 % of its SMs each, once with its own and once with
stock's evaluator settings; and, if ten minutes allow it, one worker with all of it, as stock has. The winners of all
runs are measured on the whole GPU and on a quarter of it.
"""

from devices import use_only
from side_by_side import STOCK_EVALUATOR, Side, compare
from tasks import gpu_tasks

QUARTERS = ("--sm-percent", "25", "--workers", "4")

if __name__ == "__main__":
    use_only("cuda")
    compare(
        "cuda",
        gpu_tasks,
        [
            Side("4 x 25 %", sm_percent=25, server_arguments=QUARTERS),
            Side("4 x 25 %, stock evaluator", sm_percent=25, server_arguments=QUARTERS, evaluator=STOCK_EVALUATOR),
            Side("1 x 100 %", optional=True),
        ],
    )
