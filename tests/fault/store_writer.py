"""A process that commits records and says so: one line with the trial id for each acknowledged record.

Usage: python -m tests.fault.store_writer STORE_PATH FIRST COUNT THREADS
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.contract.record_values import make_record, make_workload
from tuner_core.store.sqlite import SqliteStore

WORKLOAD = make_workload("written by a process")


def main(path: str, first: int, count: int, threads: int) -> None:
    """Commit ``count`` records, numbered from ``first``, from several threads."""
    store = SqliteStore(path)

    def write(number: int) -> None:
        record = make_record(WORKLOAD, number)
        store.commit([record], [WORKLOAD])
        os.write(1, f"{record.trial_id}\n".encode())

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(write, range(first, first + count)):
            pass
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
