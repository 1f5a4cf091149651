"""When a task has had enough: its trials go to others, or are not needed at all.

The criterion is patience, as in AutoTVM's ``early_stopping`` (trials without a better one; Chen et al., "Learning to
Optimize Tensor Programs", 1805.08166, and ``tvm.autotvm.tuner.Tuner.tune``) and XGBoost's ``early_stopping_rounds``,
but of progress that matters to the model: a task's last trials must have shortened the *model* by a certain share. That
is the backward difference in Ansor's gradient (OSDI 2020, section 6.2). Its optimistic term, that latency goes on
falling as 1/t, is left out: it never becomes negligible.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

DEFAULT_PATIENCE = 128
DEFAULT_MIN_PROGRESS = 0.001


@dataclass(frozen=True)
class EarlyStopping:
    """When to stop a task.

    Attributes:
        patience: Trials that are given a chance to make progress; 0: tasks are never stopped.
        min_progress: What these trials must shorten the model by, as a share of its present latency.
    """

    patience: int = 0
    min_progress: float = DEFAULT_MIN_PROGRESS

    def stands_still(self, weight: int, best_after_trial: Sequence[float], fresh: int, model_us: float) -> bool:
        """Whether a task's last trials made too little progress.

        Args:
            weight: How often the model calls the task.
            best_after_trial: Best latency in microseconds known after each trial, oldest first, never rising.
            fresh: Trials of this run: what is known from before says nothing about progress.
            model_us: Weighted sum of the best latencies of all tasks.
        """
        if not self.patience or fresh < self.patience or len(best_after_trial) <= self.patience:
            return False
        gained = weight * (best_after_trial[-1 - self.patience] - best_after_trial[-1])
        return gained < self.min_progress * model_us

    def line(self) -> str:
        """What is said when a task is stopped."""
        return f"stopped early, hardly any progress in {self.patience} trials"


def weighted_latency_us(tasks: Iterable[tuple[int, float | None]]) -> float:
    """The sum of weight times latency over the tasks whose latency is known."""
    return sum(weight * latency for weight, latency in tasks if latency is not None)
