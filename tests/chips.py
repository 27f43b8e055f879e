"""Meshes of TPU chips that need not exist: libtpu compiles for them ahead of time; nothing runs.

Tests that need one are marked `libtpu`; `benchmarks/_topologies.py` uses them as well.
"""

import os

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh


def chips(topology, sizes, axis_type=AxisType.Explicit, slices=1):
    """A mesh of these axes, by name and size, over the chips of a topology as libtpu names it."""
    # Without them libtpu asks the network what TPU this is, and refuses to be loaded twice.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    options = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # A device is a chip, as on Google Cloud.
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    devices = np.reshape(found.devices, tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(axis_type,) * len(sizes))
