"""Hosts for a test: namespaces of Linux, joined by cables, each with a network of its own.

A host also has processes, a ``/dev/shm`` and one folder of its own; the disk is otherwise that of
the machine. It ends with its first process, and that ends with the test, even if the test is
killed: its cables end with it, and nothing has to be cleared up.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_NEEDED = ("ip", "mount", "nsenter", "unshare")
_CLONE_NEWNET = 0x40000000

# The first process stays until its input ends, and takes up processes that lost their parent.
_FIRST = """
set -e
mount -t tmpfs -o size=256m tmpfs /dev/shm
mount -t tmpfs tmpfs "$1"
ip link set lo up
echo up
cat
:
"""


@dataclass(frozen=True, slots=True)
class Host:
    """A host.

    Attributes:
        number: Of the host, which is the end of its address.
        pid: Its first process, as the machine counts.
    """

    number: int
    pid: int

    @property
    def address(self) -> str:
        """Its address, once it has a cable or a hub."""
        return f"10.77.0.{self.number}"

    @property
    def words(self) -> list[str]:
        """What stands before the words of a command that is to run there."""
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--"]

    @property
    def card(self) -> str:
        """The address of its network card."""
        return f"02:00:00:00:77:{self.number:02x}"

    def ip(self, *words: str) -> None:
        """Change its network."""
        inside = ["nsenter", "--target", str(self.pid), "--net", "--", "ip", *words]
        subprocess.run(inside, check=True)

    def owns(self, pid: int) -> bool:
        """Whether a process runs there."""
        mine, its = (Path(f"/proc/{each}/ns/net").readlink() for each in (self.pid, pid))
        return mine == its

    def kill(self) -> None:
        """End it as a power failure does."""
        os.kill(self.pid, signal.SIGKILL)

    @contextmanager
    def running(self, *words: str, **settings: Any) -> Iterator[subprocess.Popen[str]]:
        """Run a command there, which ends with the host."""
        with subprocess.Popen([*self.words, *words], text=True, **settings) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread, and those that it starts, use the network of the host."""
        with Path("/proc/thread-self/ns/net").open("rb") as own:
            with Path(f"/proc/{self.pid}/ns/net").open("rb") as its:
                _use_network(its.fileno())
            try:
                yield
            finally:
                _use_network(own.fileno())


def _use_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def host(number: int, folder: Path) -> Iterator[Host]:
    """Have a host while the context lasts.

    Args:
        number: Of the host, from 1.
        folder: Is there for all hosts, and for each is another one.
    """
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        pytest.fail(
            f"this test makes hosts of namespaces with {', '.join(missing)}, which is missing here "
            f"(on Debian and Ubuntu: apt-get install iproute2 mount util-linux)"
        )
    if os.geteuid() != 0:
        pytest.fail("this test makes hosts of namespaces, which only root may: run it as root")
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with subprocess.Popen(
        [*command, "sh", "-c", _FIRST, "first", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as outer:
        assert outer.stdout is not None
        try:
            said = outer.stdout.readline()
            if said != "up\n":
                pytest.fail(f"no host can be made of namespaces here: {said}{outer.stdout.read()}")
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
            yield Host(number, int(children.read_text()))
        finally:
            outer.kill()


@dataclass(frozen=True, slots=True)
class Cable:
    """A cable from a host to the hub of another."""

    hub: Host
    name: str

    def cut(self) -> None:
        """Let nothing through; neither side is told."""
        self.hub.ip("link", "set", self.name, "down")

    def mend(self) -> None:
        """Let all through again."""
        self.hub.ip("link", "set", self.name, "up")


def make_hub(host: Host) -> None:
    """Give a host the address that it keeps whatever becomes of its cables."""
    host.ip("link", "add", "hub", "address", host.card, "type", "bridge")
    host.ip("address", "add", f"{host.address}/24", "dev", "hub")
    host.ip("link", "set", "hub", "up")


def plug(hub: Host, other: Host) -> Cable:
    """Lay a cable.

    Both sides know the card of the other for good. So what is sent while the cable is cut is lost
    in silence, as behind a router, and no system call says that the host cannot be reached.

    Args:
        hub: Has a hub.
        other: Gets its address, and its only way out.
    """
    name = f"to{other.number}"
    ends = ("link", "add", name, "type", "veth", "peer", "name", "out", "address", other.card)
    hub.ip(*ends, "netns", str(other.pid))
    hub.ip("link", "set", name, "master", "hub", "up")
    other.ip("address", "add", f"{other.address}/24", "dev", "out")
    other.ip("link", "set", "out", "up")
    for here, there, device in ((hub, other, "hub"), (other, hub, "out")):
        known = (there.address, "lladdr", there.card, "nud", "permanent", "dev", device)
        here.ip("neighbour", "add", *known)
    return Cable(hub, name)
