"""Which task shortens the model most with its next trials: the gradient of weighted latency.

The objective is ``f = sum_i w_i * g_i``, where ``g_i`` is task i's best latency and ``w_i`` how often the model calls
it. The gradient of f in the number of trials of task i is estimated as in Ansor (Zheng et al., OSDI 2020, section 6.2),
in the form that MetaSchedule's gradient-based scheduler uses: a mix of the progress seen lately and of the optimistic
guess that latency goes on falling as 1/t.
"""

from __future__ import annotations

from collections.abc import Sequence

ALPHA = 0.2
WINDOW_TRIALS = 32


def gain_per_trial(weight: int, best_after_trial: Sequence[float], *, window: int = WINDOW_TRIALS) -> float:
    """Expected reduction of the model's latency by one more trial of a task.

    ``w * (ALPHA * (g[n - window] - g[n]) / window + (1 - ALPHA) * g[n] / n)``, with n the number of trials.

    Args:
        weight: How often the model calls the task.
        best_after_trial: Best latency in microseconds known after each trial, oldest first, never rising; the first
            entry is the latency before any trial (the baseline).
        window: Trials over which recent progress is taken; fewer when the task has had fewer.

    Returns:
        Microseconds per trial; infinite for a task without a trial.
    """
    trials = len(best_after_trial) - 1
    if trials < 1:
        return float("inf")
    best = best_after_trial[-1]
    span = min(window, trials)
    recent = (best_after_trial[-1 - span] - best) / span
    return weight * (ALPHA * recent + (1 - ALPHA) * best / trials)
