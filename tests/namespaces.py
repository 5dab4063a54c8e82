"""Two network namespaces with a cable between them: two hosts, as far as ranks can tell."""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch.distributed as dist
from rank_world import make_store

_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000
_MS_REC, _MS_SLAVE, _MNT_DETACH = 0x4000, 0x80000, 2
_libc = ctypes.CDLL(None, use_errno=True)


class TwoHosts:
    """Hosts "0" and "1"; ``host_of_rank[rank]`` says where a rank runs. The store is on host 0."""

    def __init__(self, host_of_rank: Sequence[int]):
        self.host_of_rank = host_of_rank
        self.names = [f"flashmoe-{os.getpid()}-{host}" for host in (0, 1)]
        self.addresses = ["10.213.47.1", "10.213.47.2"]

    def make_store(self) -> dist.TCPStore:
        with open("/proc/self/ns/net") as here:
            _enter(self.names[0])
            try:
                return make_store(self.addresses[0])
            finally:
                _call("setns", here.fileno(), _CLONE_NEWNET)

    def of_rank(self, rank: int) -> Callable[[], None]:
        return functools.partial(_move_to, self.names[self.host_of_rank[rank]])

    # At host 1, so that host 0 keeps its own address: there the cable is merely unplugged.
    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "up")
        self.wait_for_carrier()

    def wait_for_carrier(self) -> None:
        deadline = time.monotonic() + 10
        for name in self.names:
            while "LOWER_UP" not in (link := ip("-n", name, "link", "show", "cable")) or "state UP" not in link:
                assert time.monotonic() < deadline, link
                time.sleep(0.02)


@contextlib.contextmanager
def two_hosts(host_of_rank: Sequence[int]) -> Iterator[TwoHosts]:
    """Skips the test, and says why, where namespaces cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip (iproute2)")
    hosts = TwoHosts(host_of_rank)
    with contextlib.ExitStack() as undo:
        for name in hosts.names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
            undo.callback(ip, "netns", "del", name)
        first, second = hosts.names
        ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(hosts.names, hosts.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
        hosts.wait_for_carrier()
        yield hosts


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _enter(namespace: str) -> None:
    with open(f"/run/netns/{namespace}") as there:
        _call("setns", there.fileno(), _CLONE_NEWNET)


def _move_to(namespace: str) -> None:
    """With a view of /sys that shows this namespace's interfaces alone, as on a host of its own."""
    _enter(namespace)
    _call("unshare", _CLONE_NEWNS)
    _call("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
    _call("umount2", b"/sys", _MNT_DETACH)
    _call("mount", b"sys", b"/sys", b"sysfs", 0, None)
    os.environ["GLOO_SOCKET_IFNAME"] = "cable"
