"""Slow links on one machine: network namespaces behind a router, with rate limits and a delay. Needs root.

Rates are token bucket filters on both ends of every link. netem is not part of every kernel, so the delay is
a line in user space: the router sends every packet through a TUN device, whose reader writes it back when it
is due. It handles packets one by one: good to about 300 Mbit/s in all.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

NET = "10.77.0"
OUTSIDE = f"{NET}.1"
_ROUTER, _GATEWAY, _LINE, _TABLE = "lhub", f"{NET}.254", "ldelay", 77
_MAX_WORKERS = 8
# linux/if_tun.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def worker_address(index: int) -> str:
    return f"{NET}.{10 + index}"


def inside(index: int) -> list[str]:
    """What to put before a command that runs as worker `index`."""
    return ["ip", "netns", "exec", f"lw{index}"]


def enter(index: int) -> None:
    """Make this process worker `index`. Call it before it has threads or sockets."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/lw{index}") as namespace:
        if libc.setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace lw{index}")


def _run(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=not check)


class Lab:
    """A star: worker i has its namespace and `worker_address(i)`, the namespace of this process `OUTSIDE`.

    speeds: Mbit/s of each worker's link, both ways; delay_ms: one way, between any two.
    """

    def __init__(self, speeds: list[int], delay_ms: float = 0.0) -> None:
        if len(speeds) > _MAX_WORKERS:
            raise ValueError(f"{len(speeds)} workers, there are addresses for {_MAX_WORKERS}")
        self._line: subprocess.Popen[str] | None = None
        self.close()
        _run(f"ip netns add {_ROUTER}")
        router = f"ip netns exec {_ROUTER} "
        # What comes back from the delay line has the address of a worker on another device.
        for setting in ("ip_forward=1", "conf.all.rp_filter=0", "conf.default.rp_filter=0"):
            _run(router + f"sysctl -qw net.ipv4.{setting}")
        _run(router + "ip link set lo up")
        devices = ["lv"]
        self._link("", "lsync0", "lv", OUTSIDE)
        for i, speed in enumerate(speeds):
            _run(f"ip netns add lw{i}")
            worker = f"ip netns exec lw{i} "
            _run(worker + "ip link set lo up")
            self._link(worker, "e0", f"lv{i}", worker_address(i))
            devices.append(f"lv{i}")
            for prefix, device in ((worker, "e0"), (router, f"lv{i}")):
                _run(
                    prefix + f"tc qdisc add dev {device} root tbf rate {speed}mbit burst 256kb latency 400ms"
                )
        if delay_ms:
            self._delay(delay_ms, devices)

    def _link(self, prefix: str, device: str, port: str, address: str) -> None:
        """A pair of devices, `port` at the router, and the routes both ways."""
        router = f"ip netns exec {_ROUTER} "
        end = f"netns {prefix.split()[3]}" if prefix else ""
        _run(f"ip link add {port} netns {_ROUTER} type veth peer name {device} {end}")
        _run(prefix + f"ip addr add {address}/32 dev {device}")
        _run(router + f"ip addr add {_GATEWAY}/32 dev {port}")
        _run(prefix + f"ip link set {device} up")
        _run(router + f"ip link set {port} up")
        _run(prefix + f"ip route add {NET}.0/24 via {_GATEWAY} dev {device} onlink src {address}")
        _run(router + f"ip route add {address}/32 dev {port}")

    def _delay(self, delay_ms: float, devices: list[str]) -> None:
        router = ["ip", "netns", "exec", _ROUTER]
        command = [*router, sys.executable, __file__, f"--delay-ms={delay_ms}"]
        self._line = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line.stdout is not None
        if self._line.stdout.readline() != "ready\n":
            raise RuntimeError("the delay line did not start")
        through = " ".join([*router, "ip"])
        _run(f"{through} route add default dev {_LINE} table {_TABLE}")
        for device in devices:
            _run(f"{through} rule add iif {device} lookup {_TABLE}")

    def close(self) -> None:
        """Remove all; also what a lab that was killed has left."""
        if self._line is not None:
            self._line.kill()
            self._line.wait()
        for name in (*(f"lw{i}" for i in range(_MAX_WORKERS)), _ROUTER):
            _run(f"ip netns del {name}", check=False)
        _run("ip link del lsync0", check=False)


def tx_bytes() -> int:
    """Bytes that this worker's interface has sent."""
    return int(Path("/sys/class/net/e0/statistics/tx_bytes").read_text())


def round_trip_ms(host: str, tries: int = 5) -> float:
    """Median time in which `host` refuses a connection to a port at which nobody listens."""
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection((host, 9), timeout=10.0).close()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def delay_line(delay_s: float) -> None:
    """Give back every packet of a TUN device after `delay_s`, until standard input is closed."""
    line = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(line, _TUNSETIFF, struct.pack("16sH22x", _LINE.encode(), _IFF_TUN | _IFF_NO_PI))
    _run(f"ip link set {_LINE} txqueuelen 10000 up")
    # The replicas keep all cores busy.
    os.nice(-10)
    print("ready", flush=True)
    held: deque[tuple[float, bytes]] = deque()
    while True:
        wait_s = max(0.0, held[0][0] - time.monotonic()) if held else None
        ready, _, _ = select.select([line, sys.stdin], [], [], wait_s)
        if sys.stdin in ready:
            return
        with contextlib.suppress(BlockingIOError):
            for _ in range(64 if ready else 0):
                packet = os.read(line, 65536)
                held.append((time.monotonic() + delay_s, packet))
        now = time.monotonic()
        while held and held[0][0] <= now:
            os.write(line, held.popleft()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The delay line of a Lab, which starts it.")
    parser.add_argument("--delay-ms", type=float, required=True)
    delay_line(parser.parse_args().delay_ms / 1e3)
