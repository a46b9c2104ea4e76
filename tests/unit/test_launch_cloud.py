"""launch/cloud.py, tpu_vm.sh, slurm.sh and local.sh train: what they start is what Kubernetes and a shell accept, goes on after
interruptions, and is shown before anything is run."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from chroma_jax.utils.chips import CHIPS  # noqa: E402
from chroma_jax.utils.errors import DIVERGED, PEER_LOST, STOPPED  # noqa: E402
from launch import jobset  # noqa: E402
from launch.cloud import COMMANDS, main  # noqa: E402
from launch.description import Description, Slurm, read  # noqa: E402
from launch.tpu import NAMES, slice_of  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
EXAMPLE = ROOT / "launch" / "example.toml"
TOOLS = ("gcloud", "kubectl", "xpk", "sbatch", "docker")


def description(**fields) -> Description:
    base = {
        "config": "chroma_4b",
        "run": "first-run",
        "prepared": "data/chroma_4b",
        "topology": "v5e:4x4",
        "project": "my-project",
    }
    base |= {"zone": "us-west4-a", "bucket": "gs://my-bucket", "image": "chroma:1", "cluster": "my-cluster"}
    return Description(**base | fields)


def executable(path: Path, *lines: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(0o755)
    return path


def shellcheck(script: str) -> None:
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tool = shutil.which("shellcheck", path=beside)
    if tool is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([tool, "-"], input=script, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def refused(argv: list[str], capsys) -> str:
    """The one line that was said."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1, err
    return err


# slices


@pytest.mark.parametrize(
    ("topology", "chips", "hosts", "devices", "label", "flags"),
    [
        ("v4:2x2x1", 4, 1, 4, "tpu-v4-podslice", ["--type=v4", "--topology=2x2x1"]),
        ("v4:4x4x8", 128, 32, 128, "tpu-v4-podslice", ["--type=v4", "--topology=4x4x8"]),
        ("v5e:1x1", 1, 1, 1, "tpu-v5-lite-podslice", ["--accelerator-type=v5litepod-1"]),
        ("v5e:4x4", 16, 4, 16, "tpu-v5-lite-podslice", ["--accelerator-type=v5litepod-16"]),
        ("v5p:16x16x24", 6144, 1536, 6144, "tpu-v5p-slice", ["--type=v5p", "--topology=16x16x24"]),
        ("v6e:16x16", 256, 64, 256, "tpu-v6e-slice", ["--accelerator-type=v6e-256"]),
        ("tpu7x:2x2x2", 8, 2, 16, "tpu7x", None),
        ("tpu7x:16x24x24", 9216, 2304, 18432, "tpu7x", None),
    ],
)
def test_a_slice_has_the_size_and_names_that_cloud_tpu_documents(topology, chips, hosts, devices, label, flags):
    s = slice_of(topology)
    assert (s.num_chips, s.hosts, s.num_devices, s.names.gke) == (chips, hosts, devices, label)
    if flags is not None:
        assert s.gcloud() == flags


def test_every_slice_consists_of_whole_hosts_and_none_occurs_twice():
    assert NAMES.keys() == CHIPS.keys()
    for name, chip in CHIPS.items():
        assert len(set(chip.shapes)) == len(chip.shapes)
        for s in (slice_of(f"{name}:{shape}") for shape in chip.shapes):
            assert s.hosts * s.chips_per_host == s.num_chips
            assert list(s.shape) == sorted(s.shape) or s.shape == (2, 2, 1)


# JobSets

SIZES = [f"{name}:{shape}" for name, chip in CHIPS.items() for shape in (chip.shapes[0], chip.shapes[3], chip.shapes[-1])]
EXTRAS = {
    "plain": {},
    "spot": {"spot": True, "init_from": "imported", "flags": ("--mesh.fsdp", "16", "--optimizer.freeze", "")},
    "reserved": {"reservation": "ours", "queue": "tpus", "kubernetes_account": "trainer", "namespace": "speech"},
}


def strict(schema):
    """The same, but a field that it does not name is an error, as for kubectl."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {name: strict(item) for name, item in schema.items()}
    if isinstance(out.get("properties"), dict) and "additionalProperties" not in out and "type" in out:
        out["additionalProperties"] = False
    return out


@pytest.fixture(scope="module")
def accepted():
    """Raises jsonschema.ValidationError for what Kubernetes would not accept as a JobSet."""
    whole = jsonschema.Draft7Validator(strict(json.loads((GOLDEN / "jobset.json").read_text())))
    kubernetes = strict(json.loads((GOLDEN / "kubernetes.json").read_text()))
    part = {
        name: jsonschema.Draft7Validator({"$ref": f"#/definitions/{name}", **kubernetes})
        for name in ("io.k8s.api.batch.v1.JobTemplateSpec", "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
    }

    def check(manifest):
        whole.validate(manifest)
        template, metadata = part.values()
        metadata.validate(manifest["metadata"])
        for job in manifest["spec"]["replicatedJobs"]:
            template.validate(job["template"])

    return check


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("topology", SIZES)
def test_a_manifest_is_one_that_kubernetes_accepts(topology, slices, extra, accepted):
    d = description(topology=topology, slices=slices, **EXTRAS[extra])
    text = jobset.to_yaml(jobset.manifest(d))
    manifest = yaml.safe_load(text)
    assert manifest == jobset.manifest(d)  # the YAML says what is meant
    accepted(manifest)
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert job["replicas"] == slices
    assert spec["parallelism"] == spec["completions"] == d.slice.hosts
    assert spec["parallelism"] * int(container["resources"]["limits"]["google.com/tpu"]) == d.slice.num_chips
    assert spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]
    exclusive = manifest["metadata"].get("annotations", {}).get("alpha.jobset.sigs.k8s.io/exclusive-topology")
    assert exclusive == ("cloud.google.com/gke-nodepool" if d.slice.hosts > 1 else None)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "restartStrategy"), "Restart"),
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "replicatedJobs", 0, "replicas"), "two"),
        (("spec", "replicatedJobs", 0, "template", "spec", "backofLimit"), 0),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartpolicy"), "Never"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "args"), "train"),
        (("metadata", "label"), {}),
    ],
)
def test_the_comparison_with_kubernetes_notices_mistakes(path, value, accepted):
    manifest = node = jobset.manifest(description())
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        accepted(manifest)


def outcome(exit_code: int | None) -> str:
    """What JobSet does after a container's exit code, or a disruption of its Pod (None), by the rules of Kubernetes'
    pod_failure_policy.go and of JobSet's failure_policy.go."""
    manifest = jobset.manifest(description())
    rules = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(rules):
        if exit_code is None and "onPodConditions" in rule:
            reason, message = (
                "PodFailurePolicy",
                f"Pod default/x-2 has condition DisruptionTarget matching FailJob rule at index {index}",
            )
        if exit_code is not None and exit_code in rule.get("onExitCodes", {}).get("values", []):
            message = (
                f"Container train for pod default/x-2 failed with exit code {exit_code} matching FailJob rule at index {index}"
            )
            reason = "PodFailurePolicy"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_bad_input_ends_a_jobset_and_interruptions_do_not_count_as_failures():
    hopeless = (2, DIVERGED, 126, 127)
    assert {code: outcome(code) for code in hopeless} == dict.fromkeys(hopeless, "FailJobSet")
    assert {code: outcome(code) for code in (STOPPED, None)} == dict.fromkeys(
        (STOPPED, None), "RestartJobSetAndIgnoreMaxRestarts"
    )
    failures = (1, PEER_LOST, 12, 22, 27, 134, 137, 139, 143)  # an exception, a lost neighbour, no memory, …
    assert {code: outcome(code) for code in failures} == dict.fromkeys(failures, "RestartJobSet")


def test_the_longest_name_fits_into_those_of_pods():
    d = description(run="r" * 40, topology="tpu7x:16x24x24", slices=99)
    assert len(f"{d.run}-slice-{d.slices - 1}-{d.slice.hosts - 1}-abcde") <= 63


text = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")))
leaves = st.one_of(
    text, st.integers(), st.booleans(), st.none(), st.sampled_from(["true", "No", "null", "a: b", "- a", "4x4", "1e3"])
)
trees = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner), st.dictionaries(text, inner)), max_leaves=12)


@given(trees)
def test_yaml_says_what_is_meant(tree):
    assert yaml.safe_load(jobset.to_yaml(tree)) == tree


# commands


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """Tools that write down what they are asked to do, and with what on standard input; the file of their notes."""
    notes = tmp_path / "notes.jsonl"
    code = "import json, os, pathlib, sys; files = {p.name: p.read_text() for p in pathlib.Path().glob('startup.sh')}"
    code += f"; given = '' if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read(); open({str(notes)!r}, 'a').write("
    code += "json.dumps([sys.argv[1:], given, files]) + chr(10)); sys.exit(int(os.environ.get('CODE', 0)))"
    for tool in TOOLS:
        executable(tmp_path / "bin" / tool, f'exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} {tool} "$@" </dev/stdin')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("sys.stdin", None)
    return notes


def noted(notes: Path) -> list[tuple[list[str], str, dict[str, str]]]:
    return [tuple(json.loads(line)) for line in notes.read_text().splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("changes", [[], ["topology=v5p:2x2x4", "slices=2", "spot=true"]], ids=["one slice", "two slices"])
def test_a_dry_run_shows_everything_and_runs_nothing(command, changes, tools, capsys):
    sets = list(itertools.chain.from_iterable(("--set", change) for change in changes))
    assert main([command, str(EXAMPLE), *sets, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert not tools.exists()
    d = read(EXAMPLE, changes)
    for argument in [] if command in ("docker", "xpk-storage") else [d.config, f"runs/{d.run}", d.prepared, *d.flags]:
        assert argument in shown
    if command == "jobset":
        assert yaml.safe_load(shown) == jobset.manifest(d)  # what is besides it are comments
        assert "kubectl create" in shown and d.cluster in shown
    else:
        shellcheck(shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_run_is_what_a_dry_run_shows(command, tools, tmp_path, capsys):
    main([command, str(EXAMPLE), "--dry-run"])
    shown = capsys.readouterr().out
    assert main([command, str(EXAMPLE)]) == 0
    ran = noted(tools)
    tools.unlink()
    if command == "jobset":
        (login, *_), (create, given, _) = ran
        assert login[:4] == ["gcloud", "container", "clusters", "get-credentials"]
        assert create == ["kubectl", "create", "--filename=-"]
        assert yaml.safe_load(given) == yaml.safe_load(shown)
        return
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "shown.sh").write_text(shown)
    subprocess.run(["bash", "-e", "../shown.sh"], stdin=subprocess.DEVNULL, check=True, cwd=tmp_path / "elsewhere")
    assert [(step, files) for step, _, files in noted(tools)] == [(step, files) for step, _, files in ran]


def command_line(command: str, *changes: str, capsys) -> list[str]:
    """The last one that a dry run shows."""
    sets = list(itertools.chain.from_iterable(("--set", change) for change in changes))
    assert main([command, str(EXAMPLE), *sets, "--dry-run"]) == 0
    shown = capsys.readouterr().out.replace("\\\n", "")
    return shlex.split([line for line in shown.splitlines() if line and not line.startswith("#")][-1])


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ([], ["--node-id=chroma-4b-1", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]),
        (["slices=2"], ["--node-count=2", "--node-prefix=chroma-4b-1"]),
        (["topology=v6e:8x8", "spot=true"], ["--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e", "--spot"]),
        (
            ["topology=v5p:2x2x4", "reservation=r"],
            ["--type=v5p", "--topology=2x2x4", "--runtime-version=v2-alpha-tpuv5", "--reserved"],
        ),
        (["topology=v4:4x4x4", "service_account=a@b.c"], ["--runtime-version=tpu-ubuntu2204-base", "--service-account=a@b.c"]),
    ],
)
def test_a_queued_resource_is_what_the_description_says(changes, flags, capsys):
    line = command_line("queued-resource", *changes, capsys=capsys)
    track = ["alpha"] if "--type=v5p" in flags else []
    assert line[: 6 + len(track)] == ["gcloud", *track, "compute", "tpus", "queued-resources", "create", "chroma-4b-1"]
    assert {*flags, "--project=my-project", "--zone=us-west4-a", "--metadata-from-file=startup-script=startup.sh"} <= {*line}
    assert ("--spot" in line, "--reserved" in line) == ("--spot" in flags, "--reserved" in flags)


@pytest.mark.parametrize(
    ("topology", "name"), [("v5e:4x4", "v5litepod-16"), ("v6e:16x16", "v6e-256"), ("v5p:4x4x8", "v5p-4x4x8")]
)
def test_an_xpk_workload_restarts_on_what_is_no_bad_input(topology, name, capsys):
    line = command_line("xpk", f"topology={topology}", "slices=2", "restarts=7", capsys=capsys)
    assert {f"--tpu-type={name}", "--num-slices=2", "--max-restarts=7", "--storage=my-bucket"} <= {*line}
    assert "--restart-on-exit-codes=1,75,76" in line  # besides xpk's own 42 and 127 to 255
    run = shlex.split(line[-1].removeprefix("--command="))
    assert run[:5] == ["exec", "python", "-m", "chroma_jax", "train"]
    assert command_line("xpk-storage", capsys=capsys)[:4] == ["xpk", "storage", "attach", "my-bucket"]


def test_each_command_line_is_shown_as_it_runs_and_a_failure_ends_the_rest(tools, monkeypatch, capsys):
    monkeypatch.setenv("CODE", "3")
    assert main(["docker", str(EXAMPLE)]) == 3
    err = capsys.readouterr().err
    assert err.startswith("+ docker build")
    assert err.splitlines()[-1] == "cloud: error: docker ended with exit code 3"
    assert len(noted(tools)) == 1


def test_a_tool_that_is_not_there_is_named_before_anything_runs(tools, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin" / "kubectl").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "kubectl is not on PATH" in refused(["jobset", str(EXAMPLE)], capsys)
    assert not tools.exists()


def test_trainings_need_neither_jax_nor_an_installation_to_be_started(tmp_path):
    command = [sys.executable, "-I", "-S", ROOT / "launch" / "cloud.py", "jobset", EXAMPLE, "--dry-run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


BAD = {
    "unknown command": (["jobsets"], ["unknown command 'jobsets'", "near: jobset"]),
    "unknown field": (["jobset", "--set", "topolgy=v5e:4x4"], ["example.toml", "'topolgy'", "near: topology"]),
    "unknown field of a table": (["slurm", "--set", "slurm.node=2"], ["'slurm.node'", "near: nodes"]),
    "unknown family": (["jobset", "--set", "topology=v7:4x4"], ["topology", "'v7:4x4'", "v5e, v5p, v6e, tpu7x"]),
    "impossible shape": (["jobset", "--set", "topology=v6e:4x5"], ["topology", "'v6e:4x5'", "4x4, 4x8, 8x8"]),
    "impossible box": (["jobset", "--set", "topology=v5p:4x8x4"], ["topology", "4x4x8", "up to 6144 chips"]),
    "wrong type": (["jobset", "--set", "slices=two"], ["slices", "'two'", "a whole number"]),
    "no boolean": (["jobset", "--set", "spot=1"], ["spot", "true or false"]),
    "no list": (["jobset", "--set", "flags=--mesh.fsdp 16"], ["flags", "a list"]),
    "too few": (["jobset", "--set", "slices=0"], ["slices", "0", "at least 1"]),
    "too few nodes": (["slurm", "--set", "slurm.nodes=0"], ["slurm.nodes", "at least 1"]),
    "a name that Kubernetes refuses": (["jobset", "--set", "run=My_Run"], ["run", "'My_Run'"]),
    "a name that is too long": (["jobset", "--set", f"run={'r' * 41}"], ["run", "at most 40"]),
    "bucket": (["jobset", "--set", "bucket=my-bucket"], ["bucket", "gs://NAME"]),
    "another bucket": (["jobset", "--set", "prepared=gs://other/data"], ["prepared", "gs://other/data", "gs://my-bucket"]),
    "path outside": (["jobset", "--set", "prepared=/data"], ["prepared", "'/data'", "in the bucket"]),
    "region for a zone": (["jobset", "--set", "zone=us-west4"], ["zone", "us-west4"]),
    "capacity of two kinds": (["jobset", "--set", "spot=true", "--set", "reservation=r"], ["spot", "reservation"]),
    "no queued resources": (["queued-resource", "--set", "topology=tpu7x:2x2x1"], ["tpu7x", "jobset"]),
    "multislice of single hosts": (["jobset", "--set", "topology=v5e:2x2", "--set", "slices=2"], ["slices", "v5e:2x2"]),
    "no change": (["jobset", "--set", "slices"], ["'slices'", "FIELD=VALUE"]),
    "unknown option": (["jobset", "--dryrun"], ["--dryrun"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_that_names_it(case, tools, capsys):
    (command, *rest), named = BAD[case]
    said = refused([command, str(EXAMPLE), *rest, "--dry-run"], capsys)
    assert all(name in said for name in named), said
    assert not tools.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, ["mine.toml", "no such description"]),
        ("config = ", ["mine.toml", "not TOML"]),
        ("run = 'x'\nprepared = 'y'", ["mine.toml", "config is missing"]),
        ("config = 'nano'\nrun = 'x'\nprepared = 'y'\ntopology = 'v5e:4x4'", ["mine.toml", "project is missing", "jobset"]),
        ("config = 'nano'\nrun = 'x'\nprepared = 'y'\nslurm = 2", ["mine.toml", "slurm", "a table"]),
    ],
)
def test_a_bad_description_is_named_with_what_it_lacks(content, named, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_text(content)
    said = refused(["jobset", str(path)], capsys)
    assert all(name in said for name in named), said


def test_the_example_names_every_field_and_its_default():
    source = EXAMPLE.read_text()
    given = tomllib.loads(source)
    assert read(EXAMPLE, [])
    optional = tomllib.loads("\n".join(re.findall(r"^# ((?:\[|[a-z_]+ = ).*)", source, re.MULTILINE)))
    for cls, table in ((Description, given), (Slurm, given["slurm"])):
        for field in dataclasses.fields(cls):
            assert field.name in table or field.name in optional, field.name
            if field.name in optional and field.name not in table and field.default not in (None, ()):
                assert optional[field.name] == field.default, field.name


def test_what_lies_in_the_bucket_is_named_as_there_or_from_its_root():
    whole = description(config="gs://my-bucket/mine.py", prepared="gs://my-bucket/data/x", init_from="gs://my-bucket/runs/a")
    short = description(config="mine.py", prepared="data/x", init_from="runs/a")
    assert whole.train() == short.train()
    expected = ["train", "/bucket/mine.py", "/bucket/runs/first-run", "--dataset_dir", "/bucket/data/x"]
    expected += ["--init-from", "/bucket/runs/a"]
    assert short.train() == expected
    assert short.train("/shared")[1] == "/shared/mine.py"


# TPU VMs


@pytest.fixture
def host(tmp_path, capsys):
    """Runs the startup script on a pretended TPU VM, whose docker ends with the given exit codes; returns the script's own, what
    it said and what it ran."""

    def boot(*codes: int, mounted: bool = True, installed: bool = True):
        main(["queued-resource", str(EXAMPLE), "--set", "restarts=2", "--set", "image=registry.example/chroma:1", "--dry-run"])
        script = re.search(r"<<'END_OF_FILE'\n(.*?)END_OF_FILE\n", capsys.readouterr().out, re.DOTALL).group(1)
        bin_, log, left = tmp_path / "bin", tmp_path / "log", tmp_path / "codes"
        left.write_text("".join(f"{code}\n" for code in codes))
        note = f'echo "${{0##*/}} $*" >>{log}'
        for tool in ("sleep", "mkdir", "gcloud", "curl", "apt-get", *(["gcsfuse"] if installed else [])):
            executable(bin_ / tool, note)
        executable(bin_ / "mountpoint", f"exit {0 if mounted else 1}")
        next_code = f'[[ $1 == run ]] || exit 0\ncode=$(head -n 1 {left}); sed -i 1d {left}; exit "$code"'
        executable(bin_ / "docker", note, next_code)
        if not installed:
            executable(
                bin_ / "apt-get",
                note,
                f"printf '#!/bin/sh\\necho gcsfuse \"$@\" >>{log}\\n' >{bin_}/gcsfuse; chmod +x {bin_}/gcsfuse",
            )
        environment = os.environ | {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
        result = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, timeout=60)
        return result.returncode, result.stdout, log.read_text().splitlines()

    return boot


def test_a_host_trains_until_it_is_done(host):
    code, said, ran = host(75, 1, 75, 137, 0)
    assert code == 0, said
    runs = [line for line in ran if line.startswith("docker run")]
    assert len(runs) == 5
    assert "the training is done" in said
    assert (
        "registry.example/chroma:1 train chroma_4b /bucket/runs/chroma-4b-1 --dataset_dir /bucket/data/chroma_4b --mesh.fsdp 16"
        in runs[0]
    )
    assert "--env=JAX_PLATFORMS=tpu,cpu" in runs[0] and "--network host" in runs[0]
    assert "gcloud auth configure-docker registry.example --quiet" in ran


@pytest.mark.parametrize("codes", [(2,), (75, 127), (STOPPED, DIVERGED)])
def test_a_host_does_not_try_again_what_cannot_succeed(codes, host):
    code, said, ran = host(*codes)
    assert code == codes[-1]
    assert f"exit code {codes[-1]}" in said
    assert len([line for line in ran if line.startswith("docker run")]) == len(codes)


def test_a_host_gives_up_after_so_many_failures(host):
    code, said, _ = host(1, STOPPED, 134, STOPPED, PEER_LOST)
    assert code == PEER_LOST
    assert "2 restarts are used up" in said


@pytest.mark.parametrize("installed", [True, False], ids=["gcsfuse there", "gcsfuse missing"])
def test_a_host_mounts_the_bucket(installed, host):
    if not installed and shutil.which("gcsfuse"):
        pytest.skip("gcsfuse is installed here")
    code, said, ran = host(0, mounted=False, installed=installed)
    assert code == 0, said
    (mount,) = [line for line in ran if line.startswith("gcsfuse ")]
    assert mount.endswith("my-bucket /bucket") and "--implicit-dirs" in mount and "--rename-dir-limit" in mount
    assert any(line.startswith("curl") for line in ran) != installed


# Slurm


@pytest.fixture
def started():
    """Starts processes; what is left of them at the end is ended."""
    groups = []

    def start(command, **options) -> subprocess.Popen:
        process = subprocess.Popen(command, text=True, stdin=subprocess.DEVNULL, start_new_session=True, **options)
        groups.append(process.pid)
        return process

    yield start
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


@pytest.fixture
def cluster(tmp_path, started):
    """Runs slurm.sh on a pretended cluster of two nodes; returns a process and where its tools keep notes."""
    log = tmp_path / "log"
    log.touch()
    note = f'echo "${{0##*/}} $*" >>{log}'

    def submit(train: list[str], state: str = "RUNNING") -> subprocess.Popen:
        bin_ = tmp_path / "bin"
        executable(bin_ / "scontrol", note, '[[ $1 == show ]] && printf "node-7\\nnode-8\\n"; exit 0')
        executable(bin_ / "squeue", f"echo {state}")
        executable(bin_ / "scancel", note, f"kill -TERM $(cat {tmp_path}/pids)")
        tasks = [
            "while [[ $1 == --* ]]; do shift; done",
            'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=0 "$@" & pids+=("$!"); done',
        ]
        tasks += [
            f'echo "${{pids[@]}}" >{tmp_path}/pids',
            'worst=0; for p in "${pids[@]}"; do wait "$p" || worst=$?; done; exit "$worst"',
        ]
        executable(bin_ / "srun", note, *tasks)
        executable(bin_ / "python3", f'echo "process ${{SLURM_LOCALID-unset}} $*" >>{log}', *train)
        environment = os.environ | {
            "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": "123456",
            "SLURM_NTASKS": "2",
        }
        environment |= {"SLURM_JOB_NODELIST": "node-[7-8]", "CHROMA_PYTHON": "python3"}
        command = [ROOT / "launch" / "slurm.sh", "nano", "run", "--dataset_dir", "data set", "--mesh.data", "16"]
        return started(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return submit, log


def test_slurm_starts_one_process_per_node_that_know_of_each_other(cluster):
    submit, log = cluster
    assert submit(["exit 0"]).wait(30) == 0
    expected = "-m chroma_jax train nano run --dataset_dir data set --mesh.data 16 --distributed.coordinator node-7:23456"
    started = sorted(line for line in log.read_text().splitlines() if line.startswith("process"))
    assert started == [f"process unset {expected} --distributed.processes 2 --distributed.process {i}" for i in range(2)]
    assert "requeue" not in log.read_text()


@pytest.mark.parametrize(
    ("code", "state", "before", "again"),
    [
        (STOPPED, "RUNNING", 0, True),
        (STOPPED, "RUNNING", 99, True),
        (STOPPED, "COMPLETING", 0, False),
        (PEER_LOST, "RUNNING", 19, True),
        (PEER_LOST, "RUNNING", 20, False),
        (137, "RUNNING", 1, True),
        (1, "RUNNING", 0, False),
        (2, "RUNNING", 0, False),
        (DIVERGED, "RUNNING", 0, False),
    ],
)
def test_slurm_queues_again_what_can_go_on_unless_it_was_cancelled(code, state, before, again, cluster, monkeypatch):
    submit, log = cluster
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(before))
    assert submit([f"exit {code}"], state).wait(30) == code
    assert ("scontrol requeue 123456" in log.read_text()) == again


def test_slurm_passes_the_end_of_its_time_on_and_waits_for_the_checkpoint(cluster):
    submit, log = cluster
    job = submit(["trap 'sleep 0.3; exit 75' TERM", f"echo ready >>{log}", "while true; do sleep 0.1; done"])
    wait_until(lambda: log.read_text().count("ready") == 2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 75, job.stdout.read()
    lines = log.read_text().splitlines()
    assert "scancel --signal=TERM 123456" in lines
    assert "scontrol requeue 123456" in lines


@pytest.mark.parametrize(("args", "environment"), [(["nano", "run"], {}), (["nano"], {"SLURM_JOB_ID": "1"})])
def test_slurm_says_how_it_is_used(args, environment):
    without = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    result = subprocess.run([ROOT / "launch" / "slurm.sh", *args], env=without | environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


# several processes on this machine


@pytest.fixture
def local(tmp_path, started):
    """Runs local.sh train in an environment whose chroma_jax is the given lines of bash, which see the process's number as $i."""

    def start(args: list[str], *train: str) -> subprocess.Popen:
        venv = tmp_path / "venv"
        stub = f'[[ $1 == -m ]] || exec {shlex.quote(sys.executable)} "$@"'
        venv.mkdir()
        executable(venv / "bin" / "python", stub, "i=${*: -1}", 'echo "started $*"', *train)
        state = subprocess.run(
            "cat requirements.txt pyproject.toml | cksum", shell=True, cwd=ROOT, capture_output=True, text=True
        )
        (venv / ".chroma_jax.core").write_text(f"{state.stdout.strip()} {ROOT} \n")
        environment = os.environ | {"CHROMA_VENV": str(venv), "CHROMA_EXTRAS": ""}
        command = [ROOT / "launch" / "local.sh", "train", *args]
        return started(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


TRAIN = ["nano", "run", "--dataset_dir", "data set"]


def test_processes_train_together_each_line_with_its_number(local):
    job = local([*TRAIN, "--processes", "3", "--", "--mesh.data", "3"], 'printf "1/2\\r2/2\\n"; echo "JAX on $JAX_PLATFORMS" >&2')
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    started = sorted(line for line in out.splitlines() if "started" in line)
    pattern = r"\[(\d)\] started -m chroma_jax train nano run --dataset_dir data set --mesh.data 3 "
    pattern += r"--distributed.coordinator 127.0.0.1:(\d+) --distributed.processes 3 --distributed.process (\d)"
    matches = [re.fullmatch(pattern, line).groups() for line in started]
    assert [(number, process) for number, _, process in matches] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert len({port for _, port, _ in matches}) == 1
    assert sorted(line for line in out.splitlines() if "/2" in line) == [f"[{i}] 2/2" for i in range(3)]
    assert sorted(err.splitlines()) == [f"[{i}] JAX on cpu" for i in range(3)]


def test_one_process_is_a_plain_training(local):
    job = local(TRAIN)
    out, err = job.communicate(timeout=60)
    assert (job.returncode, out) == (0, "started -m chroma_jax train nano run --dataset_dir data set\n"), err


def test_when_a_process_fails_the_others_are_ended_and_its_exit_code_is_returned(local):
    others = "trap 'echo ended; exit 143' TERM; for k in {1..300}; do sleep 0.1; done"
    job = local([*TRAIN, "--processes", "2"], f"if [[ $i == 1 ]]; then sleep 0.5; echo lost; exit 7; fi; {others}")
    out, err = job.communicate(timeout=60)
    assert job.returncode == 7, err
    assert "[1] lost" in out and "[0] ended" in out


@pytest.mark.parametrize("whom", ["the script", "all, as Ctrl-C does"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_all_may_save_themselves(sent, whom, local):
    job = local(
        [*TRAIN, "--processes", "2"],
        "trap 'sleep 0.$((i * 5 + 1)); echo saved; exit 75' TERM; echo ready; while :; do sleep 0.1; done",
    )
    lines = [job.stdout.readline() for _ in range(4)]
    assert sorted(line for line in lines if "ready" in line) == ["[0] ready\n", "[1] ready\n"]
    (os.kill if whom == "the script" else os.killpg)(job.pid, sent)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 75, err
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "CONFIG RUN"),
        ([*TRAIN, "--processes", "none"], "'none'"),
        ([*TRAIN, "--processes"], "--processes"),
        ([*TRAIN, "--distributed.process", "1"], "--distributed.process"),
    ],
)
def test_what_local_sh_train_does_not_understand_ends_in_one_line(args, named, local):
    job = local(args)
    out, err = job.communicate(timeout=60)
    assert (job.returncode, out) == (2, "")
    assert len(err.splitlines()) == 1 and named in err


# the image


def test_the_image_has_what_the_package_is_built_from_and_nothing_else():
    kept = {line[1:] for line in (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = {"pyproject.toml", *project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"], project["project"]["readme"]}
    needed |= {path for path in project["project"]["license-files"] if "/" not in path}
    assert kept == packages | needed


@pytest.mark.parametrize("extras", ["tpu", "cuda", "tpu,qwen"])
def test_the_image_gets_what_the_chosen_extras_list(extras):
    dockerfile = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", "")
    code = re.search(r"python -c '(.*?)' \"\$EXTRAS\"", dockerfile, re.DOTALL).group(1).replace("/source/", f"{ROOT}/")
    result = subprocess.run([sys.executable, "-c", code, extras], capture_output=True, text=True, check=True)
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert result.stdout.splitlines() == [needed for extra in extras.split(",") for needed in optional[extra]]
