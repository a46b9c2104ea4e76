"""Starts trainings on Google Cloud TPU and on GPU clusters, from one short description such as launch/example.toml.

    python -m launch.cloud COMMAND DESCRIPTION [--set FIELD=VALUE …] [--dry-run]

Needs Python and the tool that a command runs (gcloud, kubectl, xpk, sbatch, docker), not JAX. Each command line is shown before
it runs; --dry-run shows everything, and runs nothing.
"""

import argparse
import dataclasses
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # chroma-jax need not be installed where trainings are started from

from chroma_jax.utils.errors import PEER_LOST, STOPPED, InputError, near  # noqa: E402
from launch import jobset  # noqa: E402
from launch.description import BUCKET, Description, read  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a command does. notes: to know before. steps: command lines. files: text by name, in the folder where the steps run.
    manifest: what the last step reads. hints: what one may want to run then."""

    notes: list[str]
    steps: list[list[str]]
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    manifest: str | None = None
    hints: list[str] = dataclasses.field(default_factory=list)


def queued_resource(d: Description) -> Plan:
    where = [f"--project={d.project}", f"--zone={d.zone}"]
    nodes = [f"--node-id={d.run}"] if d.slices == 1 else [f"--node-count={d.slices}", f"--node-prefix={d.run}"]
    track = ["alpha"] * (d.slice.chip.name == "v5p")  # of whose shapes only that knows, as of release 528
    create = ["gcloud", *track, "compute", "tpus", "queued-resources", "create", d.run, *where, *nodes, *d.slice.gcloud()]
    create += [f"--runtime-version={d.slice.names.runtime}", "--metadata-from-file=startup-script=startup.sh"]
    create += ["--spot"] * d.spot + ["--reserved"] * bool(d.reservation)
    create += [f"--service-account={d.service_account}"] * bool(d.service_account)
    first, at = d.run if d.slices == 1 else f"{d.run}-0", shlex.join(where)
    return Plan(
        chips(d),
        [create],
        {"startup.sh": startup_script(d)},
        hints=[
            f"gcloud compute tpus queued-resources describe {d.run} {at}",
            f"gcloud compute tpus tpu-vm ssh {first} {at} --worker=0 --command='sudo docker logs --follow chroma'",
            f"gcloud compute tpus queued-resources delete {d.run} {at} --force",
        ],
    )


def startup_script(d: Description) -> str:
    """launch/tpu_vm.sh with its values."""
    first, body = (ROOT / "launch" / "tpu_vm.sh").read_text().split("\n", 1)
    values = {"BUCKET": d.bucket_name, "IMAGE": d.image, "RESTARTS": str(d.restarts), "GRACE_SECONDS": str(d.grace_seconds)}
    assignments = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    environment = [f"--env={name}={value}" for name, value in d.environment().items()]
    return "\n".join([first, *assignments, f"set -- {shlex.join([*environment, d.image, *d.train()])}", body])


def gke(d: Description) -> Plan:
    if d.slices > 1 and d.slice.hosts == 1:
        raise InputError(f"slices is {d.slices}: GKE joins only slices of several hosts, and {d.topology} has one")
    where = [f"--project={d.project}", f"--location={d.location}"]
    name = f"--namespace={d.namespace}"
    return Plan(
        [*chips(d), "The cluster needs a node pool per slice, such as:", *node_pool(d)],
        [
            ["gcloud", "container", "clusters", "get-credentials", d.cluster, *where],
            ["kubectl", "create", "--filename=-"],
        ],
        manifest=jobset.to_yaml(jobset.manifest(d)),
        hints=[
            f"kubectl describe jobset {d.run} {name}",
            f"kubectl logs --follow job/{d.run}-slice-0 {name} --container=train",
            f"kubectl delete jobset {d.run} {name}",
        ],
    )


def node_pool(d: Description) -> list[str]:
    """How one would make a node pool for one slice."""
    policy, name = f"{d.slice.chip.name}-{d.slice.shape_name}", f"{d.run}-0"
    make = ["gcloud", "container", "node-pools", "create", name, f"--cluster={d.cluster}", f"--project={d.project}"]
    make += [f"--location={d.location}", f"--node-locations={d.zone}"]
    make += [f"--machine-type={d.slice.machine}", f"--num-nodes={d.slice.hosts}"]
    make += ["--spot"] * d.spot
    make += ["--reservation-affinity=specific", f"--reservation={d.reservation}"] * bool(d.reservation)
    if d.slice.chip.name != "tpu7x":
        return [shell([*make, f"--tpu-topology={d.slice.shape_name}"])]
    if d.slice.hosts == 1:
        return [shell(make)]
    # there a policy has the topology: docs.cloud.google.com/kubernetes-engine/docs/concepts/tpu-ironwood
    first = ["gcloud", "compute", "resource-policies", "create", "workload-policy", policy, f"--project={d.project}"]
    first += [f"--region={d.zone.rpartition('-')[0]}", "--type=HIGH_THROUGHPUT", f"--accelerator-topology={d.slice.shape_name}"]
    return [shell(first), shell([*make, f"--placement-policy={policy}"])]


def xpk(d: Description) -> Plan:
    command = shlex.join(["exec", "python", "-m", "chroma_jax", *d.train()])  # in the shell's place, so that signals reach it
    create = ["xpk", "workload", "create", f"--workload={d.run}", *xpk_cluster(d)]
    create += [f"--tpu-type={d.slice.xpk()}", f"--num-slices={d.slices}"]
    create += [f"--docker-image={d.image}", f"--storage={xpk_storage(d)}"]
    # any other ends the workload, but for those of which xpk itself thinks so, 42 and 127 to 255
    create += [f"--max-restarts={d.restarts}", f"--restart-on-exit-codes=1,{STOPPED},{PEER_LOST}"]
    create += [f"--termination-grace-period-seconds={d.grace_seconds}"]
    create += [f"--env={name}={value}" for name, value in d.environment().items()]
    create += ["--spot"] * d.spot + [f"--reservation={d.reservation}"] * bool(d.reservation)
    cluster = shlex.join(xpk_cluster(d))
    return Plan(
        [*chips(d), "The image must run as root (image_user = 0), and the cluster know the bucket (xpk-storage)."],
        [[*create, f"--command={command}"]],
        hints=[f"xpk workload list {cluster}", f"xpk workload delete --workload={d.run} {cluster}"],
    )


def xpk_attach(d: Description) -> Plan:
    attach = ["xpk", "storage", "attach", xpk_storage(d), *xpk_cluster(d), "--type=gcsfuse", f"--bucket={d.bucket_name}"]
    attach += [f"--mount-point={BUCKET}", "--size=1", "--readonly=false", "--auto-mount=false", "--no-prefetch-metadata"]
    return Plan([], [[*attach, f"--mount-options={','.join(jobset.MOUNT_OPTIONS)}"]])


def xpk_cluster(d: Description) -> list[str]:
    return [f"--cluster={d.cluster}", f"--project={d.project}", f"--zone={d.zone}"]


def xpk_storage(d: Description) -> str:
    """The bucket's name among the cluster's storages."""
    return d.bucket_name.replace(".", "-").replace("_", "-")


def slurm(d: Description) -> Plan:
    s = d.slurm
    sbatch = ["sbatch", f"--job-name={d.run}", f"--nodes={s.nodes}", f"--gpus-per-node={s.gpus}"]
    sbatch += [f"--signal=B:TERM@{d.grace_seconds}", f"--export=ALL,CHROMA_PYTHON={s.python},CHROMA_RESTARTS={d.restarts}"]
    sbatch += s.options
    return Plan(
        [f"{s.nodes} × {s.gpus} GPUs: {s.nodes * s.gpus} devices of JAX; the mesh must have as many"],
        [[*sbatch, str(ROOT / "launch" / "slurm.sh"), *d.train(s.folder)[1:]]],
        hints=[f"squeue --name={d.run}", f"tail --follow {d.run}-*.log", f"scancel --name={d.run}"],
    )


def docker(d: Description) -> Plan:
    build = ["docker", "build", f"--file={ROOT / 'launch' / 'Dockerfile'}", f"--tag={d.image}"]
    build += [f"--build-arg=EXTRAS={d.extras}", f"--build-arg=RUN_AS={d.image_user}", str(ROOT)]
    return Plan([], [build, ["docker", "push", d.image]])


def chips(d: Description) -> list[str]:
    """How many devices that is, the product of the mesh."""
    s, n = d.slice, d.slices
    return [f"{n} × {d.topology}: {n * s.num_chips} chips, {n * s.num_devices} devices of JAX; the mesh must have as many"]


TPU = ("project", "zone", "bucket", "image", "topology")
# Command → (what it does, what the description must say, its plan).
COMMANDS: dict[str, tuple[str, tuple[str, ...], Callable[[Description], Plan]]] = {
    "docker": ("builds the image and pushes it", ("image",), docker),
    "queued-resource": ("asks Cloud TPU for slices, whose hosts train as soon as they boot", TPU, queued_resource),
    "jobset": ("trains on a GKE cluster", (*TPU, "cluster"), gke),
    "xpk-storage": ("makes the bucket known to a cluster made by xpk; once", (*TPU, "cluster"), xpk_attach),
    "xpk": ("trains on a cluster made by xpk", (*TPU, "cluster"), xpk),
    "slurm": ("trains on a GPU cluster", ("slurm",), slurm),
}


def planned(command: str, d: Description) -> Plan:
    """Raises: InputError for a command that does not exist, or that the description says too little for."""
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}{near(command, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    _, needed, plan = COMMANDS[command]
    for name in needed:
        if getattr(d, name) is None:
            raise InputError(f"{name} is missing, which {command} needs")
    return plan(d)


def show(plan: Plan) -> str:
    """Everything that would be done: a shell script, or a manifest for kubectl."""
    commands = [shell(step) for step in plan.steps]
    after = ["Then, as needed:", *plan.hints] if plan.hints else []
    if plan.manifest is not None:
        return commented([*plan.notes, "What is done:", *commands]) + plan.manifest + commented(after)
    files = "".join(f"cat >{name} <<'END_OF_FILE'\n{text}END_OF_FILE\n" for name, text in plan.files.items())
    return "#!/usr/bin/env bash\n" + commented(plan.notes) + files + "".join(f"{c}\n" for c in commands) + commented(after)


def commented(lines: list[str]) -> str:
    return "".join(f"# {line}\n" for text in lines for line in text.splitlines())


def shell(step: list[str]) -> str:
    """A command line as one would type it."""
    line = shlex.join(step)
    if len(line) <= 120:
        return line
    return " ".join(("\\\n    " if word.startswith("--") else "") + shlex.quote(word) for word in step)


def run(plan: Plan) -> int:
    """The exit code of the first step that fails, or 0.

    Raises: InputError, before anything is run, when a tool is not there.
    """
    for tool in dict.fromkeys(step[0] for step in plan.steps):
        if shutil.which(tool) is None:
            raise InputError(f"{tool} is not on PATH; --dry-run shows what it would be asked to do")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in plan.files.items():
            (Path(folder) / name).write_text(text)
        for step in plan.steps:
            print(f"+ {shell(step)}", file=sys.stderr, flush=True)
            given = plan.manifest if step is plan.steps[-1] else None
            code = subprocess.run(step, input=given, text=True, cwd=folder if plan.files else None).returncode
            if code:
                print(f"cloud: error: {step[0]} ended with exit code {code}", file=sys.stderr)
                return code
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def parser() -> Parser:
    usage = "python -m launch.cloud COMMAND DESCRIPTION [--set FIELD=VALUE …] [--dry-run]"
    lines = [f"  {name:<16} {does} (needs {', '.join(needs)})" for name, (does, needs, _) in COMMANDS.items()]
    out = Parser(
        prog="cloud",
        usage=usage,
        description="Starts a training that a short TOML file describes; launch/example.toml is one, and names every field.",
        epilog="\n".join(["commands:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out.add_argument("command", metavar="COMMAND", help="see below")
    out.add_argument("description", metavar="DESCRIPTION", type=Path, help="TOML file")
    out.add_argument("--set", metavar="FIELD=VALUE", action="append", default=[], help="in place of what the file says")
    out.add_argument("--dry-run", action="store_true", help="show everything, run nothing")
    return out


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: that of the tool, or 2 for bad input."""
    try:
        args = parser().parse_args(argv)
        d = read(args.description, args.set)
        try:
            plan = planned(args.command, d)
        except InputError as e:
            raise InputError(f"{args.description}: {e}") from e
        if args.dry_run:
            print(show(plan), end="")
            return 0
        code = run(plan)
        if code == 0 and plan.hints:
            print("\n".join(["Then, as needed:", *plan.hints]))
        return code
    except InputError as e:
        print(f"cloud: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
