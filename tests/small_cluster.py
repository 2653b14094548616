"""A Ray cluster of several nodes on this machine."""

from __future__ import annotations

import sys

RECONNECT_SECONDS = 15
"""Seconds after which a process gives a lost head up; Ray's default is a minute."""


class SmallCluster:
    """A cluster whose head runs no tasks, with some worker nodes."""

    def __init__(self, nodes, **system):
        from ray._common.network_utils import find_free_port
        from ray.cluster_utils import Cluster

        job_port = find_free_port()
        self.job_address = f"http://127.0.0.1:{job_port}"
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": True,
                "node_ip_address": "127.0.0.1",
                "dashboard_host": "127.0.0.1",
                "dashboard_port": job_port,
                "dashboard_agent_listen_port": find_free_port(),
                "_system_config": {
                    "gcs_rpc_server_reconnect_timeout_s": RECONNECT_SECONDS,
                    **system,
                },
            },
        )
        self.nodes = [self.add_node(**node) for node in nodes]

    def add_node(self, **options):
        """Add a node; it listens at the loopback address."""
        return self.cluster.add_node(node_ip_address="127.0.0.1", **options)

    def lose_node(self, node):
        """End the raylet of a node by SIGKILL: its workers end with it."""
        self.cluster.remove_node(node, allow_graceful=False)

    def lose_head(self):
        """End the process that knows of all nodes."""
        self.cluster.head_node.kill_gcs_server()

    def restart_head(self):
        """Start that process again; what it knew is in Redis, where there is one."""
        self.cluster.head_node.start_gcs_server()


def by_value(function):
    """Return a function that goes to workers with its code: they can't import a test module."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    return function
