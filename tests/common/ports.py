"""Ports for jobs of tests."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port of this host on which nobody listens, and which the system gives to no connection until the job takes it.

    That is, one below the range from which Linux takes the ports of outgoing connections: other tests make many meanwhile.
    """
    while True:
        # Not the seeded generator of a test: tests that run side by side would all try the same ports.
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
