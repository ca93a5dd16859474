"""A Ray cluster of two machines as far as Ray knows, each a raylet with a store and a processor of its own, on
loopback.

python tests/inference/two_nodes.py   prints the address and the process ids of both raylets, and ends with its
standard input
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # the first: loopback only


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ic-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"RAY_TMPDIR": folder, "TMPDIR": folder}  # the second: where workers unpack the model
        from ray.cluster_utils import Cluster

        Path(folder, "ray").mkdir()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        second = cluster.add_node(num_cpus=1)
        raylets = [node.all_processes["raylet"][0].process.pid for node in (cluster.head_node, second)]
        print(cluster.address, *raylets, flush=True)
        sys.stdin.read()
        cluster.shutdown()


if __name__ == "__main__":
    main()
