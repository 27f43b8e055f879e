"""What of the messages is exposed: the time in which a device waits, and has no other work.

The order is that of `execute.py`. The first bucket's tiles travel before any work, the others'
under the work on the bucket before. Finished tiles travel back under the work on the bucket after,
and those of the last bucket after all work. What is done in chunks can hide all but the
first trip and the last behind its own work. While devices share a matrix, their messages can hide
behind the work on all other buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

from optax_muon.platforms import get_device
from optax_muon.sharding.bucket_plan import BucketPlan
from optax_muon.sharding.cost import CostModel


def exposed_seconds(buckets: Sequence[BucketPlan], model: CostModel, kind: str) -> float:
    """Modelled time of an update in which a device waits for messages.

    Args:
        buckets: In the order in which they are run.
        model: The rates.
        kind: The platform or the kind of device, which says what can be hidden; CPUs hide nothing.
    """
    device = get_device(kind)
    work = [model.work_seconds(each.cost) for each in buckets]
    before, after = [0.0, *work[:-1]], [*work[1:], 0.0]
    exposed = 0.0
    for i, each in enumerate(buckets):
        exposed += model.message_seconds(each.cost)
        inward = working = outward = between = 0.0
        for part in each.assignments:
            hidden = part.can_hide(device)
            inward += hidden.inward.total / part.chunks
            working += hidden.working.total
            outward += hidden.outward.total / part.chunks
            between += (hidden.inward.total + hidden.outward.total) * (1 - 1 / part.chunks)
        for received, there in (
            (inward, before[i]),
            (working, sum(work) - work[i]),
            (outward, after[i]),
            (between, work[i]),
        ):
            exposed -= min(received / model.bandwidth, there)
    return exposed
