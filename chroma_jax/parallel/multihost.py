"""Several processes as one training: how they come together, agree, stop at the same step, and end when one of them is lost.

On a TPU pod every host runs the same command, and JAX finds the others by itself. Elsewhere flags say who is who:

    chroma-jax train … --distributed.coordinator HOST:PORT --distributed.processes 2 --distributed.process 0
    chroma-jax train … --distributed.coordinator HOST:PORT --distributed.processes 2 --distributed.process 1
"""

import contextlib
import dataclasses
import glob
import importlib.util
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from chroma_jax.parallel.heartbeats import Heartbeats, on_abort
from chroma_jax.parallel.progress import Progress, process_started
from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.utils.errors import PEER_LOST, InputError, TrainingStopped
from chroma_jax.utils.fields import Checked, NonNegativeInt, PositiveFloat, PositiveInt


@dataclasses.dataclass(frozen=True)
class DistributedConfig(Checked):
    """Which process of a training this is. On a TPU pod the hosts find each other without flags.

    Attributes:
        coordinator: HOST:PORT at which all processes reach process 0.
        processes: Number of processes; 1 keeps a TPU host alone.
        process: Number of this process, from 0.
        peer_seconds: A process without a sign of life for this many seconds is lost, and the others end; at the start they wait
            ten times as long.
    """

    coordinator: str | None = None
    processes: PositiveInt | None = None
    process: NonNegativeInt | None = None
    peer_seconds: PositiveFloat = 30.0

    def __post_init__(self):
        super().__post_init__()
        given = (self.coordinator, self.processes, self.process)
        if given not in ((None, None, None), (None, 1, None)) and None in given:
            raise ValueError("coordinator, processes and process belong together")
        if self.processes is not None and (self.process or 0) >= self.processes:
            raise ValueError(f"process is {self.process} of {self.processes}; they are counted from 0")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"coordinator is {self.coordinator!r}, expected HOST:PORT")


@contextlib.contextmanager
def joined(config: DistributedConfig, mesh: MeshConfig) -> Iterator[Progress]:
    """A training's `Progress`, while this process belongs to it; to be entered before anything touches JAX's devices.

    With several processes, one that fails leaves this with its error, and the others with a message that names it; none waits
    for it. Raises: InputError when the processes do not come together, or the mesh does not divide among them.
    """
    initialize(config, mesh)
    progress = Progress()
    progress.began = process_started()
    if jax.process_count() == 1:
        yield progress
        return
    if mesh.num_devices != jax.device_count():
        raise InputError(f"mesh {mesh.shape} has {mesh.num_devices} devices, all processes together {jax.device_count()}")
    peers = meet(config, progress)
    try:
        yield progress
    except TrainingStopped:  # all processes at the same step
        leave(peers)
        raise
    except BaseException as error:
        code = log_failure(error)
        if peers is not None:
            peers.fail(error, code)
        sys.stdout.flush()
        os._exit(code)  # the usual way out waits for the others, who wait for this one
    leave(peers)


def log_failure(error: BaseException) -> int:
    """Says what a process ends with. Returns its exit code."""
    if isinstance(error, InputError):
        print(f"chroma-jax: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    traceback.print_exception(error)
    sys.stderr.flush()
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def initialize(config: DistributedConfig, mesh: MeshConfig) -> None:
    """Brings the processes together, if there are several, and gives a host without an accelerator its part of the devices."""
    alone = config.coordinator is None and (config.processes == 1 or not on_tpu())
    parts = config.processes or 1
    if mesh.num_devices % parts:
        raise InputError(f"mesh {mesh.shape} has {mesh.num_devices} devices, which {parts} processes cannot share evenly")
    if jax.config.jax_num_cpu_devices < mesh.num_devices // parts or parts > 1:
        with contextlib.suppress(RuntimeError):  # JAX is running already; the mesh will say what is missing
            jax.config.update("jax_num_cpu_devices", mesh.num_devices // parts)
    if alone or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = f"at {config.coordinator}" if config.coordinator else "on this TPU (--distributed.processes 1 trains on one host)"
    patience = round(10 * config.peer_seconds)

    def absent() -> None:
        """XLA aborts when some do not come."""
        own = f"process {config.process}" if config.process is not None else "this process"
        print(f"chroma-jax: error: {own} waited {patience} s {where} for the others", file=sys.stderr, flush=True)
        os._exit(PEER_LOST)

    on_abort(absent)
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator,
            num_processes=config.processes,
            process_id=config.process,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=max(20, round(2 * config.peer_seconds)),  # the second line, after those of `peers`
            shutdown_timeout_seconds=60,
        )
    except (RuntimeError, ValueError, OSError) as e:
        raise InputError(f"the processes did not come together {where}: {str(e).splitlines()[0][:300]}") from e
    on_abort(lambda: None)


def on_tpu() -> bool:
    """Whether JAX is going to use TPU chips of this host; found out without touching them."""
    wanted = jax.config.jax_platforms
    if (wanted and "tpu" not in wanted.split(",")) or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def meet(config: DistributedConfig, progress: Progress) -> Heartbeats | None:
    """The other processes, by heartbeats; None when process 0 cannot be reached, which is said."""
    here, token, port, peers = 0, 0, 0, None
    if jax.process_index() == 0:
        token = secrets.randbits(31)
        peers, port = Heartbeats.listening(progress, config.peer_seconds, token)
        host = config.coordinator.rpartition(":")[0] if config.coordinator else own_address()
        with contextlib.suppress(OSError):
            here = int.from_bytes(socket.inet_aton(socket.gethostbyname(host.strip("[]"))))
    address = np.array([here >> 16, here & 0xFFFF, port, token], np.int32)
    high, low, port, token = (int(x) for x in multihost_utils.broadcast_one_to_all(address))
    if peers is None:
        host = socket.inet_ntoa((high << 16 | low).to_bytes(4))
        try:
            peers = Heartbeats.connected(jax.process_index(), progress, config.peer_seconds, token, (host, port))
        except OSError as e:
            print(f"no heartbeats to process 0 at {host}:{port} ({e}); JAX's own remain", file=sys.stderr, flush=True)
    return peers


def own_address() -> str:
    """Of the interface that leads outwards; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def leave(peers: Heartbeats | None) -> None:
    if peers is not None:
        peers.leave()


# Agreement


def log(text: str) -> None:
    """Prints it once, whatever the number of processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def broadcast_one_to_all(value: int) -> int:
    """What process 0 gives, on every process, none of which gets it before all have asked."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def all_processes_agree(holds: bool) -> bool:
    """Whether it holds on every process."""
    return holds if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(holds))))


def data_shard(sharding: NamedSharding, rows: int) -> dict[str, int]:
    """The arguments by which a reader takes this process's rows of every batch. Where an axis that does not divide rows goes
    through several processes, these read the same ones.

    Raises: InputError when processes have some of their rows in common, but not all.
    """
    held: dict[int, set[int]] = {}
    along_rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    for device, index in along_rows.devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, set()).add(index[0].start or 0)
    groups = sorted({tuple(sorted(starts)) for starts in held.values()})
    if len({start for group in groups for start in group}) < sum(map(len, groups)):
        raise InputError(f"mesh {dict(sharding.mesh.shape)}: processes share some of their rows of a batch, but not all")
    mine = tuple(sorted(held[jax.process_index()]))
    return {"process_index": groups.index(mine), "process_count": len(groups)}


class StopRequest:
    """A request to stop after the running step, from a signal or from a time limit.

    While it is entered, SIGTERM and Ctrl-C set the request instead of ending the process. The second signal ends it at once.
    The time limit counts from construction. It never applies before the first step, so that every invocation makes progress.

    With several processes, JAX's preemption service passes a SIGTERM that any of them received to all of them, and `reached`
    is true at the same step in each. Process 0 alone watches the time limit, and requests the stop in the same way.

    Attributes:
        asked: Whether a stop was requested.
        expired: Whether the time limit was the reason; the same on every process once `reached` is true.
    """

    def __init__(self, limit_seconds: float = 0.0, *, clock: Callable[[], float] = time.monotonic):
        """Args:
        limit_seconds: Wall time after which to stop; 0 for no limit.
        clock: Returns seconds from any fixed origin.
        """
        self.asked, self.expired, self.before = False, False, {}
        self.several = jax.distributed.is_initialized()
        self.clock, self.deadline = clock, clock() + limit_seconds if limit_seconds else math.inf
        self.first_step: int | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            # JAX's handler of SIGTERM is not Python's: it must not be replaced before it has served
            for number in (signal.SIGINT,) if self.several else (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        print("\nstopping after this step; once more ends at once", file=sys.stderr, flush=True)
        if self.several:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop now; every process calls it at every step."""
        self.first_step = step if self.first_step is None else self.first_step
        if not self.asked and step > self.first_step and self.clock() >= self.deadline and jax.process_index() == 0:
            self.asked = self.expired = True
            if self.several:
                os.kill(os.getpid(), signal.SIGTERM)
        if not self.several:
            return self.asked
        if multihost_utils.reached_preemption_sync_point(step):
            self.asked, self.expired = True, bool(broadcast_one_to_all(self.expired))
            if threading.current_thread() is threading.main_thread():
                self.before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self.handle) or signal.SIG_DFL
            return True
        return False
