"""How many SMs a percentage grants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tuner_core.errors import TunerError

_GRANULARITIES = (2, 1, 4, 8, 16)  # SMs are granted in groups; in pairs (TPCs) on every GPU since Volta that we saw


@dataclass(frozen=True)
class SmShares:
    """SM counts by percentage.

    Attributes:
        total: SMs of the device.
        granularity: SMs are granted in multiples of it.
        rounds_up: Whether a share that is no multiple is rounded up rather than down.
        seen: Counts that were read from the device, which go before the rule.
    """

    total: int
    granularity: int = 2
    rounds_up: bool = False
    seen: Mapping[int, int] | None = None

    def at(self, sm_percent: int) -> int:
        """SMs that a client with this percentage sees.

        Args:
            sm_percent: 1..100.
        """
        if sm_percent >= 100:
            return self.total
        if self.seen is not None and sm_percent in self.seen:
            return self.seen[sm_percent]
        groups = self.total * sm_percent / 100 / self.granularity
        whole = math.ceil(groups) if self.rounds_up else math.floor(groups)
        return min(self.total, max(1, whole) * self.granularity)


def fit_shares(total: int, seen: Mapping[int, int]) -> SmShares:
    """The rule by which a device grants shares, from a few that were read back.

    Args:
        total: SMs of the device.
        seen: SM count by percentage; at least one below 100.

    Raises:
        TunerError: The caps were not applied.
    """
    capped = {percent: count for percent, count in seen.items() if percent < 100}
    for percent, count in capped.items():
        if count >= total:
            raise TunerError(f"a share of {percent} % saw all {total} SMs: this driver's MPS does not cap its clients")
    for rounds_up in (False, True):
        for granularity in _GRANULARITIES:
            rule = SmShares(total, granularity, rounds_up)
            if all(rule.at(percent) == count for percent, count in capped.items()):
                return SmShares(total, granularity, rounds_up, dict(seen))
    return SmShares(total, seen=dict(seen))  # no rule fits: what was read is right, the rest an estimate
