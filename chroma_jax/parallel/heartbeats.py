"""Heartbeats among the processes of a training: one that is gone, silent or has failed ends the others, by name.

JAX has heartbeats of its own, but it aborts without saying which process was lost and how far it had come, and it does not know
how to tell the reason from what followed of it. Here process 0 listens, and every other one is connected to it. They send each
other lines of JSON: where they are, many times within the time after which silence counts as death; "left" when all is done;
"failed" with the reason; and process 0, when it knows of a loss, "lost" with who and why, before it ends itself. A thread does
all that, and needs no help from a loop that hangs.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal

from tqdm import tqdm

from chroma_jax.parallel.progress import Progress
from chroma_jax.utils.errors import PEER_LOST, InputError

GRACE = 5.0  # seconds in which what another process failed from may be found here too, or by which it is known who was lost


@dataclasses.dataclass
class Peer:
    """What is known of another process. process: None until it has said it; heard: when it last spoke; failed: when it said so of
    itself, and why."""

    process: int | None = None
    step: int = -1
    doing: str = "starting"
    heard: float = dataclasses.field(default_factory=time.monotonic)
    state: Literal["running", "failed", "gone", "left"] = "running"
    failed: float = math.inf
    why: str = ""
    code: int = PEER_LOST  # its exit code
    rest: bytes = b""

    def __str__(self) -> str:
        at = "before its first step" if self.step < 0 else f"after step {self.step}"
        return f"process {self.process} was last heard of {at}, at {self.doing!r}"


class Heartbeats:
    """The other processes of this one. Process 0 makes one with `listening`, the others with `connected` to its address."""

    def __init__(self, process: int, progress: Progress, seconds: float, token: int):
        """seconds: of silence after which a process is taken for lost. token: by which one of this training is known."""
        self.process, self.progress, self.seconds, self.token = process, progress, seconds, token
        self.peers: dict[socket.socket, Peer] = {}
        self.selector = selectors.DefaultSelector()
        self.server: socket.socket | None = None  # of process 0
        self.outbox: dict | None = None  # what is to be said beside the heartbeat, once
        self.said, self.over = threading.Event(), threading.Event()
        self.judging = True
        self.thread = threading.Thread(target=self.run, name="peers", daemon=True)
        progress.others, progress.give_up = self.described, self.end

    @classmethod
    def listening(cls, progress: Progress, seconds: float, token: int) -> tuple["Heartbeats", int]:
        """Returns the peers of process 0, and the port on which it listens."""
        peers = cls(0, progress, seconds, token)
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        peers.server = socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6)
        peers.server.setblocking(False)
        peers.selector.register(peers.server, selectors.EVENT_READ)
        peers.start()
        return peers, peers.server.getsockname()[1]

    @classmethod
    def connected(cls, process: int, progress: Progress, seconds: float, token: int, address: tuple[str, int]) -> "Heartbeats":
        """Raises OSError when process 0 cannot be reached."""
        peers = cls(process, progress, seconds, token)
        peers.add(socket.create_connection(address, timeout=seconds), Peer(process=0))
        peers.start()
        return peers

    def start(self) -> None:
        on_abort(lambda: self.over.is_set() or time.sleep(2 * GRACE))
        self.thread.start()

    # what the main thread calls

    def leave(self) -> None:
        """All is done here; nobody shall wait."""
        self.judging = False
        self.tell({"left": True})
        self.over.set()

    def fail(self, error: BaseException, code: int) -> None:
        """Ends the other processes with the exit code of this one, which is about to end. Returns when they know the reason. If
        another process is the root cause, this one has ended with its reason before."""
        bad_input = isinstance(error, InputError)  # which the others have as well
        self.judging = not bad_input
        self.tell({"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300], "code": code})
        until = time.monotonic() + GRACE - 1
        while time.monotonic() < until and not (bad_input and self.alone):
            time.sleep(0.05)
        self.over.set()

    @property
    def alone(self) -> bool:
        """Whether nobody depends on this process, as all do on process 0."""
        return self.process > 0 or all(peer.state != "running" for peer in self.peers.values())

    def tell(self, message: dict) -> None:
        self.outbox = message
        self.said.wait(GRACE)

    # the thread

    def run(self) -> None:
        every, due, told = min(self.seconds / 10, 1.0), 0.0, -1
        while not self.over.is_set():
            for key, _ in self.selector.select(timeout=every / 4):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self.server:
                    self.add(connection.accept()[0], Peer())
                else:
                    self.read(connection)
            if self.outbox is not None or self.progress.step != told or time.monotonic() >= due:
                message, self.outbox, due, told = self.outbox, None, time.monotonic() + every, self.progress.step
                self.send(message or {})
                if message is not None:
                    self.said.set()
            if self.judging:
                self.check_peers()

    def add(self, connection: socket.socket, peer: Peer) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peers[connection] = peer
        self.selector.register(connection, selectors.EVENT_READ)

    def read(self, connection: socket.socket) -> None:
        peer = self.peers[connection]
        try:
            data = connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
            stranger = any(said["token"] != self.token for said in messages)
        except (ValueError, KeyError, TypeError):  # whatever else may find this port
            messages, stranger = [], True
        if stranger or not data:
            self.selector.unregister(connection)
            peer.state = "gone" if peer.state == "running" else peer.state
            return
        peer.heard = time.monotonic()
        for said in messages:
            peer.process, peer.step, peer.doing = said["process"], said["step"], said["doing"]
            if "left" in said:
                peer.state = "left"
            elif "failed" in said:
                peer.state, peer.failed, peer.why = "failed", peer.heard, said["failed"]
                peer.code = said.get("code", PEER_LOST)
            elif said.get("lost", self.process) != self.process and self.judging:
                self.end(said["why"], said.get("code", PEER_LOST))

    def send(self, message: dict) -> None:
        step, doing, _ = self.progress.state
        said = {"token": self.token, "process": self.process, "step": step, "doing": doing} | message
        for connection, peer in self.peers.items():
            if peer.state in ("running", "failed"):
                with contextlib.suppress(OSError):  # who does not take it is found by its silence
                    connection.send(json.dumps(said).encode() + b"\n")

    def check_peers(self) -> None:
        now = time.monotonic()
        for peer in sorted(self.peers.values(), key=lambda peer: peer.failed):  # who fails first is the reason of others
            silent = now - peer.heard
            if peer.process is None:  # not one of this training, or not yet
                continue
            if peer.state == "gone":
                self.lost(peer, "is gone (its connection closed)")
            elif now - peer.failed > GRACE:
                self.lost(peer, f"failed ({peer.why})")
            elif peer.state == "running" and silent > self.seconds:
                self.lost(peer, f"has been silent for {silent:.0f} s: it hangs, or the network does")

    def lost(self, peer: Peer, how: str) -> None:
        message = f"process {peer.process} {how}; {peer}"
        self.send({"lost": peer.process, "why": message, "code": peer.code})
        self.end(message, peer.code)

    def described(self) -> str:
        return "; ".join(str(peer) for peer in self.peers.values() if peer.process is not None)

    def end(self, message: str, code: int = PEER_LOST) -> None:
        """Ends this process, whatever its other threads are waiting for."""
        self.over.set()
        step = self.progress.step
        own = f"process {self.process} ends " + (f"after step {step}" if step >= 0 else "as well")
        tqdm.get_lock().acquire(True, 1)  # these are the last words: no progress bar after them
        print(f"\nchroma-jax: error: {message}; {own}, exit code {code}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # a folder that cannot be written must not keep the process alive
            self.progress.last_words(message)
        os._exit(code)


ABORT = ctypes.CFUNCTYPE(None, ctypes.c_int)
KEPT: list = []  # what C code refers to must stay


def on_abort(wait: Callable[[], object]) -> None:
    """Has ``wait`` called before this process aborts.

    When the coordinator is gone, XLA aborts at once from a thread of its own, and Python's signal handlers never run. The signal
    of an abort comes in the thread that aborts, so waiting in its handler lets another thread have the last word. Where that
    cannot be arranged, such an end is still an end, with XLA's own message.
    """
    with contextlib.suppress(OSError, AttributeError):
        KEPT.append(ABORT(lambda _: wait()))
        ctypes.CDLL(None).signal(signal.SIGABRT, KEPT[-1])
