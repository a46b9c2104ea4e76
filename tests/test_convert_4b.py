"""Import and export at the released model's size, with random bits: every tensor comes back bit for bit, and neither command
holds more than 4 GiB beside the arrays. Needs 30 GB of disk and 17 GB of memory; prints the peaks."""

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import TYPES, write
from safetensors import safe_open

pytestmark = pytest.mark.slow
MANIFEST = json.loads((Path(__file__).parent / "golden" / "manifest.json").read_text())
GIB = 2**30


def run(*command: str) -> float:
    """Runs a command of chroma-jax. Returns the most memory that it held at any time, in GiB."""
    process = subprocess.Popen([sys.executable, "-m", "chroma_jax", *command], stdout=subprocess.PIPE, text=True)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")]
            peak[0] = max(peak[0], *found, 0)
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    output, _ = process.communicate()
    thread.join()
    assert process.returncode == 0, output
    return peak[0] * 1024 / GIB


def nbytes(*prefixes: str) -> int:
    found = [x for name, x in MANIFEST.items() if name.startswith(prefixes)]
    return sum(math.prod(x["shape"]) * TYPES[x["dtype"]].itemsize for x in found)


@pytest.mark.parametrize("devices", [8, 1])
def test_the_released_size_there_and_back(tmp_path, devices):
    source, imported, exported = tmp_path / "source", tmp_path / "run", tmp_path / "export"
    write(MANIFEST, source)
    vision, codec = nbytes("thinker.visual."), nbytes("codec_model.")
    arrays = nbytes("") - vision - codec
    # the Codec is read after the rest has been written, so that the import never holds both
    limits = {"import": arrays / GIB + 4, "export": (arrays + codec) / GIB + 4}
    begun = time.time()
    peak = run("convert", "import", str(source), str(imported), "--keep-unused", "--mesh.fsdp", str(devices))
    print(f"\n{devices} devices: import {time.time() - begun:.0f} s, peak {peak:.2f} GiB of at most {limits['import']:.2f}")
    assert peak < limits["import"]
    shutil.rmtree(source)
    begun = time.time()
    peak = run("export", str(imported), str(exported))
    print(f"{devices} devices: export {time.time() - begun:.0f} s, peak {peak:.2f} GiB of at most {limits['export']:.2f}")
    assert peak < limits["export"]
    shutil.rmtree(imported)
    assert_same_bits(exported)


def assert_same_bits(exported: Path) -> None:
    """Against the same random bits, drawn again."""
    files = {}
    for file in exported.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as handle:
            files |= dict.fromkeys(handle.keys(), file)
    assert files.keys() == MANIFEST.keys()
    rng = np.random.default_rng(0)
    for name, entry in MANIFEST.items():
        dtype = TYPES[entry["dtype"]]
        expected = rng.bytes(math.prod(entry["shape"]) * dtype.itemsize)
        with safe_open(files[name], framework="numpy") as handle:
            found = handle.get_tensor(name)
        assert (list(found.shape), found.dtype) == (entry["shape"], dtype), name
        assert found.tobytes() == expected, name
