"""Where a run stands and what came of it, told from its sequencer and ledger."""

from __future__ import annotations

from typing import Any

import numpy as np

from paramserver.sequencer import Sequencer


class Standing:
    """Tells of one run; `status` tells what is new since it was called last."""

    def __init__(self, sequencer: Sequencer) -> None:
        self._sequencer = sequencer
        self._seen_rows = 0

    def status(self, now: float) -> dict[str, Any]:
        """Return where the run stands at second ``now``, and what the latest pushes were like."""
        s = self._sequencer
        new = s.ledger.rows(self._seen_rows)
        self._seen_rows = len(s.ledger)
        applied = new[new["dropped"] == 0]
        recent: dict[str, Any] = {}
        if len(applied):
            values, counts = np.unique(applied["staleness"], return_counts=True)
            recent["staleness"] = dict(zip(values.tolist(), counts.tolist(), strict=True))
            recent["staleness_mean"] = float(np.mean(applied["staleness"]))
            recent["staleness_max"] = int(np.max(applied["staleness"]))
        losses = applied["loss"][~np.isnan(applied["loss"])]  # a product has none
        if len(losses):
            recent["loss"] = float(np.mean(losses))
        if s.sizer is not None:
            recent["batch_size"] = s.sizer.size(s.version)
        return {
            "updates": s.version,
            "gradients": s.gradients,
            "samples": s.samples,
            "seconds": now,
            "live": s.live(),
            "waiting": {w: (sorted(o), t) for w, (o, t) in s.waiting(now).items()},
            "waited_s": sum(wait.seconds for wait in s.waits.values()),
            "dropped": s.ledger.drop_reasons(),
            "ended": s.ended,
            "error": s.error,
            **recent,
        }

    def summary(self) -> dict[str, Any]:
        """Return what a run's record says of the ledger, the rule's bounds and the waits."""
        s = self._sequencer
        staleness: dict[str, Any] = s.ledger.staleness.summary()
        staleness["per_worker"] = {
            w: {"pushes": f.pushes, "mean": f.mean, "max": f.max}
            for w, f in s.ledger.staleness.per_worker().items()
        }
        cancelled = {} if s.rule.cancel_age is None else {"cancelled": s.num_cancelled}
        return {
            "staleness": staleness,
            "dropped": s.ledger.drop_reasons(),
            **cancelled,
            "conservation": s.conservation.report(),
            "invariants": [
                {"name": n, "bound": limit, "worst": value} for n, (value, limit) in s.worst.items()
            ],
            "waits": {
                k: {"count": w.count, "seconds": w.seconds} for k, w in sorted(s.waits.items())
            },
        }
