"""What is trained where: one short TOML file, from which every command of `launch.cloud` is made."""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from chroma_jax.utils.build import build
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, NonNegativeInt, PositiveInt
from launch.tpu import Slice, slice_of

BUCKET = "/bucket"  # where a job sees the bucket


@dataclasses.dataclass(frozen=True)
class Slurm(Checked):
    """Training on a GPU cluster: one process per node, with all its GPUs.

    folder: takes the bucket's place; on a file system that all nodes see. python: of the environment in which chroma-jax is
    installed. gpus: per node. options: further ones of sbatch, such as "--partition=gpu" and "--time=24:00:00".
    """

    folder: str
    nodes: PositiveInt = 1
    gpus: PositiveInt = 8
    python: str = "python3"
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Description(Checked):
    """A training.

    config: a shipped configuration's name, or a file in the bucket (gs://… or PATH.py). run: the job's name; the run folder is
    runs/NAME in the bucket. prepared, init_from: folders in the bucket. flags: further ones of ``chroma-jax train``.

    topology: one slice, such as "v5e:4x4"; slices: so many of it. bucket: gs://NAME. image: as docker push takes it. extras:
    of the package in the image. image_user: whom it runs as, where the job does not say (xpk does not: there it must be 0).
    spot, reservation: what capacity.

    cluster, cluster_location (by default the zone's region), namespace, queue (of Kueue), kubernetes_account (that may read and
    write the bucket): on GKE. service_account: of TPU VMs, an e-mail address.

    restarts: so many failures are followed by another try; interruptions do not count, but for xpk and Slurm. grace_seconds: from
    being asked to stop to being ended, for a last checkpoint; spot machines grant 30 at most.
    """

    config: str
    run: str
    prepared: str
    init_from: str | None = None
    flags: tuple[str, ...] = ()
    topology: str | None = None
    slices: PositiveInt = 1
    project: str | None = None
    zone: str | None = None
    bucket: str | None = None
    image: str | None = None
    extras: str = "tpu"
    image_user: NonNegativeInt = 1000
    spot: bool = False
    reservation: str | None = None
    cluster: str | None = None
    cluster_location: str | None = None
    namespace: str = "default"
    queue: str | None = None
    kubernetes_account: str | None = None
    service_account: str | None = None
    restarts: NonNegativeInt = 20
    grace_seconds: PositiveInt = 300
    slurm: Slurm | None = None

    def __post_init__(self):
        super().__post_init__()
        # it becomes part of Pods' names (NAME-slice-7-63-abcde, 63 letters at most) and of TPU VMs'; xpk allows 40 letters
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.run):
            raise InputError(f"run is {self.run!r}, expected a name of a-z, 0-9 and -, from a letter on, of at most 40")
        if self.bucket is not None and not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9]", self.bucket):
            raise InputError(f"bucket is {self.bucket!r}, expected gs://NAME, without a folder")
        if self.zone is not None and not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone):
            raise InputError(f"zone is {self.zone!r}, expected a zone such as us-central1-a")
        if self.spot and self.reservation:
            raise InputError(f"spot is true and reservation is {self.reservation!r}; capacity is of one kind")
        if self.topology is not None:
            slice_of(self.topology)
        for name in ("config", "prepared", "init_from"):
            self._inside("", name)

    @property
    def slice(self) -> Slice:
        return slice_of(self.topology)

    @property
    def bucket_name(self) -> str:
        return self.bucket.removeprefix("gs://")

    @property
    def location(self) -> str:
        """Of the cluster."""
        return self.cluster_location or self.zone.rpartition("-")[0]

    def train(self, root: str = BUCKET) -> list[str]:
        """The arguments of chroma-jax, the bucket (or what takes its place) being at ``root``."""
        init_from = [] if self.init_from is None else ["--init-from", self._inside(root, "init_from")]
        config = self._inside(root, "config") if self.config.endswith(".py") else self.config
        return [
            "train",
            config,
            f"{root}/runs/{self.run}",
            "--dataset_dir",
            self._inside(root, "prepared"),
            *init_from,
            *self.flags,
        ]

    def environment(self) -> dict[str, str]:
        """Variables of a training on TPU: without a TPU it is an error, and what was compiled once is there after a restart."""
        return {"JAX_PLATFORMS": "tpu,cpu", "JAX_COMPILATION_CACHE_DIR": f"{BUCKET}/compiled"}

    def _inside(self, root: str, name: str) -> str | None:
        """Where something in the bucket is seen."""
        value = getattr(self, name)
        if value is None:
            return None
        if value.startswith("gs://"):
            if self.bucket is None or not value.startswith(f"{self.bucket}/"):
                raise InputError(f"{name} is {value!r}, which is not in the bucket {self.bucket}")
            value = value.removeprefix(f"{self.bucket}/")
        if value.startswith("/") or ".." in value.split("/") or not value:
            raise InputError(f"{name} is {value!r}, expected a path in the bucket, such as data/chroma_4b")
        return f"{root}/{value}"


def read(path: Path, changes: list[str]) -> Description:
    """The description in a file. changes: "FIELD=VALUE", which take precedence; VALUE as in TOML, or text.

    Raises: InputError naming the file, or --set, and the field.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such description; launch/example.toml is one")
    try:
        tree = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not TOML: {e}") from e
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"--set {change!r}: expected FIELD=VALUE")
        *tables, leaf = name.split(".")
        node = tree
        for table in tables:
            node = node.setdefault(table, {})
            if not isinstance(node, dict):
                raise InputError(f"--set {change!r}: {table} has no fields")
        node[leaf] = parsed(value)
    return build(Description, tree, path)


def parsed(value: str) -> Any:
    """A value of --set."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
