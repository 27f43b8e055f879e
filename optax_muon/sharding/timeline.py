"""What of the messages is exposed: the time in which a device waits, and has no other work.

The order is that of `execute.py`. The first bucket's tiles travel before any work, the others'
under the work on the bucket before. Finished tiles travel back under the work on the bucket after,
and those of the last bucket after all work. While devices share a matrix, their messages can hide
behind the products of all other buckets. What is done in chunks waits for its own messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optax_muon.platforms import get_platform
from optax_muon.sharding.cost import CostModel

if TYPE_CHECKING:
    from optax_muon.sharding.plan import BucketPlan


def exposed_seconds(buckets: Sequence[BucketPlan], model: CostModel, platform: str) -> float:
    """Modelled time of an update in which a device waits for messages.

    Args:
        buckets: In the order in which they are run.
        model: The rates.
        platform: `tpu`, `gpu` or `cpu`; CPUs hide nothing.
    """
    if not get_platform(platform).hides_messages:
        return sum(model.message_seconds(each.cost) for each in buckets)
    products = [each.cost.flops / model.flops for each in buckets]
    before, after = [0.0, *products[:-1]], [*products[1:], 0.0]
    return sum(
        _exposed(each, model, before[i], sum(products) - products[i], after[i])
        for i, each in enumerate(buckets)
    )


def _exposed(
    bucket_plan: BucketPlan, model: CostModel, before: float, others: float, after: float
) -> float:
    """What is left of a bucket's messages, given the seconds of products that can hide them."""
    chunked = [each.cost for each in bucket_plan.assignments if each.chunks > 1]
    traffic = [each.cost.traffic for each in bucket_plan.assignments if each.chunks == 1]
    inward, working, outward = (
        sum(parts) / model.bandwidth
        for parts in (
            (each.inward for each in traffic),
            (each.working for each in traffic),
            (each.outward for each in traffic),
        )
    )
    hidden = ((inward, before), (working, others), (outward, after))
    return sum(max(0.0, taken - there) for taken, there in hidden) + sum(
        map(model.message_seconds, chunked)
    )
