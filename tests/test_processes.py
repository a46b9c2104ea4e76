"""What a training of several processes promises: the same losses as one, and an end and a beginning whatever happens to one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import config_file, replace
from toy import ToyConfig, run_toy

from chroma_jax.parallel.sharding import MeshConfig
from chroma_jax.runs.status import accounts
from chroma_jax.training.metrics import read_lines
from chroma_jax.training.runtime.goodput import read_goodput_log
from chroma_jax.utils.errors import DIVERGED, PEER_LOST, STOPPED

HERE = Path(__file__).parent
STEPS = 24


def lines_of(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_lines(run / "metrics.jsonl")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Processes:
    """Two processes of a training, started together. said: what each has printed, once `ended` has waited for it."""

    def __init__(self, command: list, out: Path, *, own: Sequence[list] = ([], [])):
        """own: what only one of the two is told."""
        settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
        self.outputs = [out / f"process_{i}_{time.monotonic_ns()}.txt" for i in range(2)]
        self.processes = [
            subprocess.Popen(
                [str(word) for word in (*command, *own[i])],
                env=os.environ | settings,
                stdout=self.outputs[i].open("w"),
                stderr=subprocess.STDOUT,
            )
            for i in range(2)
        ]

    def wait_for(self, reached) -> None:
        deadline = time.monotonic() + 120
        while not reached() and time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            time.sleep(0.02)
        assert reached(), [path.read_text()[-2000:] for path in self.outputs]

    def send(self, process: int, number: signal.Signals) -> float:
        self.processes[process].send_signal(number)
        return time.monotonic()

    def ended(self, *which: int, within: float = 120) -> list[int]:
        """Exit codes."""
        deadline = time.monotonic() + within
        return [self.processes[i].wait(timeout=max(0.1, deadline - time.monotonic())) for i in which or (0, 1)]

    def said(self, process: int) -> str:
        return self.outputs[process].read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def toys(run: Path, *more, own: Sequence[list] = ([], []), seconds: float = 10) -> Processes:
    port = free_port()
    command = [sys.executable, HERE / "toy.py", run, "--steps", STEPS, "--peer-seconds", seconds, *more]
    own = [["--distributed", port, 2, i, *own[i]] for i in range(2)]
    run.parent.mkdir(exist_ok=True, parents=True)
    return Processes(command, run.parent, own=own)


def has_saved(run: Path, step: int):
    return lambda: (run / "checkpoints" / str(step)).exists()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Two processes of four devices each that nothing happens to."""
    run = tmp_path_factory.mktemp("straight") / "run"
    with toys(run) as processes:
        assert processes.ended() == [0, 0], processes.said(0)
    return run


@pytest.mark.slow
def test_two_processes_of_four_devices_have_the_losses_of_one_of_eight(straight, tmp_path):
    run_toy(replace(ToyConfig(), "training.steps", STEPS), tmp_path / "run")
    ours, theirs = lines_of(straight), lines_of(tmp_path / "run")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in a.keys() & {"train/loss", "valid/loss"}:
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), a["step"]


@pytest.mark.slow  # by default one process is killed, and stopped, in test_training and test_alive
def test_killed_and_asked_to_stop_two_processes_go_on_bit_for_bit(straight, tmp_path):
    """kill −9 of one: the other is gone within 60 seconds, says who was lost, and the restart goes on from the checkpoint.
    SIGTERM to one: both save at the same step, and the restart goes on from there."""
    run = tmp_path / "run"
    with toys(run, "--fault", "slow", 0) as processes:
        processes.wait_for(has_saved(run, 4))
        killed = processes.send(1, signal.SIGKILL)
        assert processes.ended(0) == [PEER_LOST] and time.monotonic() - killed < 60
        last = processes.said(0).strip().splitlines()[-1]
        assert re.search(r"error: process 1 is gone.* last heard of after step \d+.*process 0 ends after step \d+", last), last
    with toys(run, "--fault", "slow", 0) as processes:
        processes.wait_for(has_saved(run, 6))
        processes.send(1, signal.SIGTERM)
        assert processes.ended() == [STOPPED, STOPPED]
        stopped = [re.search(r"asked to stop at step (\d+) of", processes.said(i))[1] for i in range(2)]
        assert stopped[0] == stopped[1] and has_saved(run, stopped[0])()
    with toys(run) as processes:
        assert processes.ended() == [0, 0]
        assert f"resuming {run} from step {stopped[0]}" in processes.said(0) and "resuming" not in processes.said(1)
    assert lines_of(run) == lines_of(straight)
    lost, asked = accounts(read_goodput_log(run))["restarts"]
    assert "process 1 is gone" in lost["why"] and "asked to stop" in asked["why"] and asked["lost_steps"] == 0


@pytest.mark.slow
def test_the_time_limit_stops_two_processes_at_the_same_step(tmp_path):
    run = tmp_path / "run"
    with toys(run, "--fault", "slow", 0, "--max-minutes", 0.01) as processes:
        assert processes.ended() == [STOPPED, STOPPED]
        steps = [re.search(r"time limit .* reached at step (\d+) of", processes.said(i))[1] for i in range(2)]
    assert steps[0] == steps[1] and has_saved(run, steps[0])()


@pytest.mark.slow
def test_without_the_coordinator_the_other_process_ends_with_a_message(tmp_path):
    run = tmp_path / "run"
    with toys(run, "--fault", "slow", 0) as processes:
        processes.wait_for(has_saved(run, 2))
        killed = processes.send(0, signal.SIGKILL)
        assert processes.ended(1) == [PEER_LOST] and time.monotonic() - killed < 60
        assert re.search(r"error: process 0 is gone.*after step \d+.*exit code 76", processes.said(1))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_process_that_is_stopped_but_not_dead_is_noticed_by_its_silence(frozen, tmp_path):
    run = tmp_path / "run"
    with toys(run, "--fault", "slow", 0, seconds=3) as processes:
        processes.wait_for(has_saved(run, 2))
        stopped = processes.send(frozen, signal.SIGSTOP)
        assert processes.ended(1 - frozen) == [PEER_LOST] and time.monotonic() - stopped < 60
        assert re.search(rf"error: process {frozen} has been silent for 3 s.*after step \d+", processes.said(1 - frozen))


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_ends_the_others_with_its_reason(failing, tmp_path):
    own = [["--fault", "fail", 5] if i == failing else [] for i in range(2)]
    with toys(tmp_path / "run", own=own) as processes:
        codes = processes.ended(within=60)
    assert codes == [1, 1]
    assert "OSError: the disk is on fire" in processes.said(failing)
    assert f"process {failing} failed (OSError: the disk is on fire)" in processes.said(1 - failing)


@pytest.mark.slow
@pytest.mark.parametrize("refusing", [0, 1])
def test_a_refusal_of_one_process_ends_all_with_its_exit_code(refusing, tmp_path):
    own = [["--fault", "refuse", 5] if i == refusing else [] for i in range(2)]
    with toys(tmp_path / "run", own=own) as processes:
        first = processes.ended(refusing, within=60)
        ended = time.monotonic()
        assert first == [2] and processes.ended(1 - refusing, within=60) == [2] and time.monotonic() - ended < 10
    assert f"process {refusing} failed (InputError: data: a record is damaged)" in processes.said(1 - refusing)


@pytest.mark.slow
def test_a_loop_that_hangs_shows_every_processs_stacks_and_ends_them(tmp_path):
    """Its heartbeats go on, so that only the stall tells."""
    with toys(tmp_path / "run", "--stall-seconds", 4, own=([], ["--fault", "hang", 5])) as processes:
        assert processes.ended(within=60) == [PEER_LOST, PEER_LOST]
    for i in range(2):
        assert "STALL" in processes.said(i) and "END OF STACKS" in processes.said(i)
    assert "time.sleep" not in processes.said(0) and re.search(r"toy\.py.* in step", processes.said(1))
    assert re.search(r"STALL: process 0 .*process 1 was last heard of after step 5", processes.said(0))


@pytest.mark.slow
def test_processes_that_do_not_come_together_say_so(tmp_path):
    command = [sys.executable, HERE / "toy.py", tmp_path / "run", "--peer-seconds", 1]
    ports = free_port(), free_port()
    with Processes(command, tmp_path, own=[["--distributed", ports[i], 2, i] for i in range(2)]) as processes:
        assert processes.ended(within=60) == [PEER_LOST, PEER_LOST]
    for i in range(2):
        assert f"process {i} waited 10 s at localhost:{ports[i]} for the others" in processes.said(i)


@pytest.mark.slow
def test_bad_steps_end_all_processes_alike(tmp_path):
    with toys(tmp_path / "run", "--fault", "nan", 5) as processes:
        assert processes.ended() == [DIVERGED, DIVERGED]
    assert all("last good checkpoint is" in processes.said(i) for i in range(2))


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_given_up_by_all(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    damaged = run / "checkpoints" / str(STEPS)
    (damaged / "seal.json").unlink()  # or the damage would be found before anything is read
    for file in (damaged / "weights" / "ocdbt.process_1" / "d").iterdir():
        file.unlink()
    with toys(run) as processes:
        assert processes.ended() == [0, 0], processes.said(0)
        assert f"going on from checkpoints/{STEPS - 2}" in processes.said(0)
    assert lines_of(run) == lines_of(straight)


# The real ones


def commands(source: Path, prepared: Path, run: Path, port: int, mesh: dict, steps: int) -> Processes:
    command = [sys.executable, "-m", "chroma_jax", "train", source, run, "--dataset_dir", prepared, "--training.steps", steps]
    command += [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", size)]
    command += ["--distributed.coordinator", f"localhost:{port}", "--distributed.processes", 2, "--distributed.process"]
    return Processes(command, run.parent, own=([0], [1]))


@pytest.mark.slow
def test_two_processes_train_the_same_speaking_model_as_one(tiny_prepared, tmp_path):
    from chroma_jax.runs.train import train

    config, prepared = tiny_prepared
    source, run = config_file(tmp_path, config.data.corpus), tmp_path / "run"
    with commands(source, prepared, run, free_port(), {"fsdp": 8}, 4) as processes:
        assert processes.ended(within=300) == [0, 0], processes.said(0)
    train(replace(config, "mesh", MeshConfig(fsdp=8)), tmp_path / "one", prepared)
    compare(run, tmp_path / "one", rel=1e-6)


@pytest.mark.slow
def test_two_processes_train_the_same_codec_as_one(tmp_path, monkeypatch):
    """Through all phases: every process fits the quantizer for itself. Adam's first steps are as long where a gradient is nothing
    but rounding as anywhere; they are short here, so that rounding stays rounding. From jaxlib 0.11 on a library (YNN) rounds
    products of float32 by how they are shared among threads; what is compared does without it."""
    from test_codec_run import CODEC, PHASES, config_for
    from tiny_corpus import write_corpus

    from data_pipelines.waves import prepare_waves

    if jax.__version_info__ >= (0, 11):
        monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_cpu_experimental_ynn_fusion_type=")

    corpus = write_corpus(tmp_path / "corpus")
    short = {"recipe__optimizer__learning_rate": 3e-4, **PHASES}
    called = f"config_for({str(corpus)!r}, **{short})"
    config = config_for(corpus, **short)
    prepare_waves(config.data, CODEC, tmp_path / "waves", progress="none")
    source, run = tmp_path / "source.py", tmp_path / "run"
    source.write_text(f"from test_codec_run import config_for\ndef config():\n    return {called}\n")
    with commands(source, tmp_path / "waves", run, free_port(), {"data": 4, "fsdp": 2}, 6) as processes:
        assert processes.ended(within=400) == [0, 0], processes.said(0)
    alone = [sys.executable, "-m", "chroma_jax", "train", source, tmp_path / "one", "--dataset_dir", tmp_path / "waves"]
    alone += ["--training.steps", "6", "--mesh.data", "4", "--mesh.fsdp", "2"]
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    subprocess.run(alone, env=os.environ | settings, check=True, capture_output=True)
    compare(run, tmp_path / "one", rel=1e-6)  # what float32 sums in another order differ by, three times over


def compare(run: Path, other: Path, rel: float) -> None:
    ours, theirs = lines_of(run), lines_of(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.endswith("loss") or name.endswith("commitment"):
                np.testing.assert_allclose(a[name], b[name], rtol=rel, err_msg=f"{a['step']}: {name}")
