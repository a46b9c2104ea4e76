"""Plans of programs that the TPU compiler compiles, where it is installed."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
import tiny

from chroma_jax.cli.main import main
from chroma_jax.config import Config, module_of, on_pod, read_config
from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.planning import hlo, kernels, report, schedules
from chroma_jax.planning.devices import compile_only_devices, ring_bandwidth
from chroma_jax.planning.plan import plan_step, plan_training, without_tpu
from chroma_jax.utils.chips import CHIPS, parse_topology
from chroma_jax.utils.errors import InputError

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (extra 'tpu')")


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the table is of the compiler that JAX 0.12 comes with, libtpu 0.0.50")
def test_schedules_of_the_kernels_are_those_of_the_compiler():
    found = dict(pair for name in ("splash", "short", "flash") for pair in schedules.of_chip("v6e", name, 64))
    known = kernels.SCHEDULES | kernels.LOOPS
    assert len(found) == 5 and all(known[key] == schedule for key, schedule in found.items())


def planned(topology: str, mesh: MeshConfig, slices: int = 1, **changes):
    config: Config = dataclasses.replace(tiny.config(), mesh=mesh)
    for name, value in changes.items():
        config = tiny.replace(config, name.replace("__", "."), value)
    without_tpu()
    return plan_training(config, parse_topology(topology, slices), effort="quick")


@pytest.mark.slow
@needs_compiler
def test_a_training_step_is_planned_for_chips_that_are_not_here():
    """Eight of them, as two slices, which divide the data axis and are joined by the network."""
    speech = {"optimizer__freeze": ("reasoner/",), "loss__text_weight": 0.0, "loss__ctc_weight": 0.0}  # less to compile
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    plan, program = planned("v5e:2x2", mesh, slices=2, training__global_batch_size=32, **speech)
    assert plan.chips == 8 and plan.memory.free > 0.5 and plan.unknown_loops == 0
    assert 0 < plan.mfu < 1 and plan.step_seconds >= plan.roof_seconds > 0
    found = program.memory_analysis()
    assert plan.memory.total == pytest.approx(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    crossed = {axis for t in plan.traffic for axis in t.axes.split()}
    assert crossed == {"data", "fsdp", "tensor"}
    between = [t for t in plan.traffic if t.kind == hlo.BETWEEN_SLICES]
    assert [t.axes for t in between] == ["data"]
    assert between[0].seconds == pytest.approx(between[0].bytes / CHIPS["v5e"].dcn) and between[0].bytes > 1000
    page = report.page(plan, 1.2)
    for part in ("backbone backward", "all-gather over fsdp", "mfu", "$ an hour"):
        assert part in page, part
    assert {"step_seconds", "mfu", "memory", "traffic"} <= plan.json().keys()


@pytest.mark.slow
@needs_compiler
def test_the_training_step_of_a_codec_is_planned_by_the_same_command(tmp_path, capsys):
    flags = {"recipe.discriminator_start_step": 10, "recipe.discriminator.windows": 64, "recipe.discriminator.filters": 2}
    flags |= {"recipe.loss.resolutions.windows": 64, "recipe.loss.resolutions.bins": 5, "model.seanet.num_filters": 4}
    flags |= {"model.seanet.ratios": "5 4", "model.transformer.num_hidden_layers": 1, "model.quantizer.num_codebooks": 2}
    flags |= {"data.crop_frames": 4, "mesh.data": 4, "effort": "quick", "dollars_per_chip_hour": 1, "out": tmp_path / "plan.json"}
    given = [text for name, value in flags.items() for text in (f"--{name}", *str(value).split())]
    assert main(["plan", "codec_nano", "--topology", "v5e:2x2", *given]) == 0
    page, plan = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    for part in (
        "step of a codec with quantizer, discriminator",
        "codec_decode backward",
        "hours of sound",
        "$ an hour of sound",
    ):
        assert part in page, part
    assert {"codec_encode", "codec_decode", "discriminator", "mel_loss"} <= plan["flops"].keys()
    assert plan["memory"]["trained"] > 0 and plan["memory"]["free"] > 0.9 and plan["unknown_loops"] == 0
    assert any(t["axes"] == "data" and t["kind"] == "all-reduce" for t in plan["traffic"])
    for wrong in (["--step", "stream"], ["--search"], ["--aot_executable", "p"]):
        assert main(["plan", "codec_nano", "--topology", "v5e:2x2", *wrong]) == 2


@pytest.mark.slow
@needs_compiler
def test_splash_attention_compiles_where_no_tpu_is():
    _, program = planned(
        "v5e:2x2",
        MeshConfig(fsdp=4),
        model__backbone__attention="splash",
        model__reasoner__text__attention="splash",
        data__row__positions=256,
    )
    assert "tpu_custom_call" in program.as_text()


@needs_compiler
def test_a_mesh_that_the_topology_does_not_fit_is_an_error():
    with pytest.raises(InputError, match="has 8 devices, v5e:2x2 has 4"):
        planned("v5e:2x2", MeshConfig(fsdp=8))


@needs_compiler
def test_a_mesh_that_the_slices_do_not_divide_is_an_error():
    with pytest.raises(InputError, match="data must be a multiple of the 2 slices"):
        planned("v5e:2x2", MeshConfig(fsdp=8), slices=2)


@needs_compiler
def test_a_ring_has_two_ways_and_a_line_one():

    for name, expected in (("v5e:4x4", 1), ("v5e:16x16", 2)):
        topology = parse_topology(name)
        side = topology.shape[0]
        mesh = make_mesh(MeshConfig(data=side, fsdp=side), compile_only_devices(topology))
        along = np.arange(side)  # of the axis fsdp, which lies along one dimension
        assert ring_bandwidth(topology, along, mesh.devices) == expected * CHIPS["v5e"].link


POD_CONFIGS = [
    (f"{name}@{pod}", pod.partition("x")[2] if pod[0].isdigit() else pod, int(pod[0]) if pod[0].isdigit() else 1)
    for name in ("chroma_4b_stage1", "chroma_4b_stage2", "chroma_4b_full", "chroma_4b_lora", "codec_mimi")
    for pod in module_of(name)[1].PODS
]
ENOUGH = 0.05  # of the memory, for the runtime and for what fragments


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("config", "topology", "slices"), POD_CONFIGS)
def test_every_shipped_configuration_fits_the_pods_it_names(config, topology, slices):
    without_tpu()
    plan, _ = plan_step(read_config(config), parse_topology(topology, slices), effort="quick")
    assert plan.memory.free >= ENOUGH and plan.unknown_loops == 0, report.page(plan)


def test_every_pod_has_a_mesh_of_its_devices():
    for config, name, slices in POD_CONFIGS:
        topology, found = parse_topology(name, slices), read_config(config)
        assert found.mesh.num_devices == topology.num_chips * topology.chip.devices, config
        assert found.training.global_batch_size % found.mesh.num_row_shards == 0, config
        assert on_pod(config.partition("@")[0], name, slices) == config
    assert on_pod("nano", "v5e:4x4") == "nano" and on_pod("chroma_4b_full@v5p:4x4x4", "v5e:4x4") == "chroma_4b_full@v5p:4x4x4"
    with pytest.raises(InputError, match="no mesh for 'v5e:4x5' .near: v5e:4x4"):
        read_config("chroma_4b_full@v5e:4x5")


@pytest.mark.slow
@needs_compiler
def test_the_small_configuration_fits_on_one_chip():
    without_tpu()
    plan, _ = plan_training(read_config("nano"), parse_topology("v5e:1x1"), effort="quick")
    assert plan.memory.free >= ENOUGH


@pytest.mark.slow
@needs_compiler
def test_the_decode_steps_are_planned_for_one_device(tmp_path, capsys):
    plan = ["plan", str(tiny.config_file(tmp_path)), "--topology", "v5e:1x1"]
    plan += ["--step", "stream", "--positions", "64", "--effort", "quick"]
    assert main([*plan, "--slots", "2", "--weights", "int8", "--cache", "int8", "--out", str(tmp_path / "plan.json")]) == 0
    page = capsys.readouterr().out
    assert "2 conversations, weights int8, caches int8 of 64 positions" in page and "HBM at full bandwidth" in page
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["pair"]["read"] > found["frame"]["read"] > 0
    assert found["pair"]["hbm_bytes"] > found["frame"]["hbm_bytes"] and not found["pair"]["unknown_loops"]
    assert main([*plan, "--slots", "0"]) == 2
    assert main([*plan, "--slots", "2", "--generation.tensor", "2"]) == 2  # of one device


@pytest.mark.slow
@needs_compiler
def test_the_decode_steps_are_planned_for_devices_that_share_a_model(tmp_path, capsys):
    plan = ["plan", "nano", "--step", "stream", "--positions", "64", "--effort", "quick", "--slots", "2"]
    for topology in ("v5e:1x1", "v5e:2x2"):
        assert main([*plan, "--topology", topology, "--out", str(tmp_path / topology)]) == 0
    assert "each of 4 chips that share the model" in capsys.readouterr().out
    alone, shared = (json.loads((tmp_path / topology).read_text())[0] for topology in ("v5e:1x1", "v5e:2x2"))
    c = read_config("nano").model
    text, audio = c.reasoner.text, c.reasoner.audio
    mlps = 3 * sum(
        stack.num_hidden_layers * stack.hidden_size * stack.intermediate_size for stack in (text, c.backbone, c.decoder)
    )
    heard = audio.num_hidden_layers * (
        2 * audio.hidden_size * (2 * audio.hidden_size + audio.intermediate_size + 1) + audio.intermediate_size
    )
    # all else is whole on each: the Codec, and what two heads of keys do not divide by four
    in_quarters = 2 * (mlps + heard + 2 * c.reasoner.vocab_size * text.hidden_size)
    assert shared["chips"] == 4 and alone["weights"] - shared["weights"] == 3 / 4 * in_quarters
    assert shared["pair"]["link_seconds"] > 0 == alone["pair"]["link_seconds"]
