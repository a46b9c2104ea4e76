"""Speaks from a serving artifact without the model's code. Needs jax, flatbuffers, numpy, safetensors and soundfile only.

    python serve_artifact.py ARTIFACT PROMPT OUT

ARTIFACT: folder that ``chroma-jax export --format stablehlo`` wrote. PROMPT: safetensors file that ``chroma-jax prompt`` wrote.
OUT: folder for frames.npz and, for each row, ROW.wav.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import soundfile
from jax import export
from safetensors.flax import load_file

artifact, prompt, out = map(Path, sys.argv[1:])
facts = json.loads((artifact / "artefact.json").read_text())
programs = {
    name: export.deserialize(bytearray((artifact / program["file"]).read_bytes())).call
    for name, program in facts["programs"].items()
}
prefill, step = jax.jit(programs["prefill"]), jax.jit(programs["step"], donate_argnums=1)  # a step takes over the old state
weights = load_file(artifact / facts["weights"])

state, frames = prefill(weights, load_file(prompt)), []
for _ in range(facts["sizes"]["max_frames"]):
    state, output = step(weights, state)
    frames.append(jax.device_get(output))
    if not frames[-1]["live"].any():  # every row has ended
        break

frames = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
out.mkdir(parents=True, exist_ok=True)
np.savez(out / "frames.npz", **frames)
for row, live in enumerate(frames["live"].T):
    soundfile.write(out / f"{row}.wav", frames["samples"][live, row].ravel(), facts["sampling_rate"])
