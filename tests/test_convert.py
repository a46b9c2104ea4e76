"""Promises of import and export: every tensor is accounted for, comes back bit for bit, and lies where training wants it; what
does not fit is listed at once and leaves nothing behind."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tiny import config_file

from chroma_jax import config as configs
from chroma_jax.cli.main import main
from chroma_jax.config import Config
from chroma_jax.convert import importer
from chroma_jax.convert.export import export_checkpoint, tensors_of
from chroma_jax.convert.importer import import_sources, place, plan_import
from chroma_jax.convert.sources import csm_rope, read_codec
from chroma_jax.layers import rope
from chroma_jax.models.io import name_tables as names
from chroma_jax.models.io.hf_config import llama_to_hf, to_hf
from chroma_jax.models.io.name_tables import ROTARY_PAIRS
from chroma_jax.models.io.weight_files import abstract_weights, outputs, read_weights
from chroma_jax.parallel.sharding import MeshConfig, make_mesh
from chroma_jax.planning.training_step import trainer_of
from chroma_jax.runs.load import load_run
from chroma_jax.runs.starting_weights import starting_weights
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.utils.errors import InputError
from chroma_jax.utils.locks import Owner
from chroma_jax.utils.tree_paths import values

MANIFEST = Path(__file__).parent / "golden" / "manifest.json"
MODEL = tiny.model()
CONFIG = tiny.config()
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
VISION = {"thinker.visual.patch_embed.weight": (4, 6), "thinker.visual.merger.bias": (5,)}


def random_bits(shape: tuple[int, ...], dtype, rng: np.random.Generator) -> np.ndarray:
    """Any bits at all: NaN and numbers too small to be computed with among them."""
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def released(seed: int = 0) -> dict[str, np.ndarray]:
    """A tiny checkpoint as it is released: the thinker in bfloat16, the rest in float32, vision on top."""
    rng, shapes = np.random.default_rng(seed), abstract_weights(MODEL)
    rows = names.chroma_rows(MODEL) + names.codec_rows(MODEL)
    tensors: dict[str, np.ndarray] = {}
    for x in outputs(shapes, rows):
        tensors[x.name] = random_bits(x.shape, BFLOAT16 if x.name.startswith("thinker.") else np.float32, rng)
    return tensors | {name: random_bits(shape, BFLOAT16, rng) for name, shape in VISION.items()}


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict | None = None, files: int = 2) -> Path:
    """A checkpoint in several files with an index."""
    folder.mkdir(parents=True)
    every = list(tensors)
    weight_map = {name: f"model-{i % files + 1}.safetensors" for i, name in enumerate(every)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in every if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def all_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert (x.shape, x.dtype) == (theirs[name].shape, theirs[name].dtype), name
        assert x.tobytes() == theirs[name].tobytes(), name


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    config = to_hf(MODEL)
    config["thinker_config"] |= {"vision_config": {"depth": 1}, "tie_word_embeddings": False}
    folder = write(tmp_path_factory.mktemp("convert") / "released", released(), config)
    (folder / "tokenizer.json").write_text('{"kept": "as it is"}')
    return folder


@pytest.fixture(scope="module")
def onto(tmp_path_factory) -> str:
    return str(config_file(tmp_path_factory.mktemp("onto")))


def imported(dest: Path, *sources: Path, config: Config = CONFIG, unused: str = "leave") -> Path:
    import_sources(plan_import(sources, config, Config), dest, unused)
    return dest


def weights_of(run: Path) -> dict[str, np.ndarray]:
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(run, CONFIG.checkpoint, access="read") as checkpoints:
        held = checkpoints.held()
        abstract = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first) for n, x in held.items()}
        return {n: np.asarray(x) for n, x in checkpoints.restore_weights(abstract).items()}


# The released checkpoint, from its manifest alone


def test_importing_the_released_checkpoint_accounts_for_every_tensor_and_says_what_is_left_out():
    plan = plan_import([MANIFEST], configs.read_config("chroma_4b"), Config)
    lines = plan.lines()
    assert "Chroma, 1906 tensors" in lines[0]
    assert "924 of the reasoner, 146 of the backbone, 40 of the decoder, 278 of the codec" in lines[1]
    assert lines[2].strip() == "not read: 518 of vision, which a speaking model does not have"
    assert len(lines) == 3 and 924 + 146 + 40 + 278 + 518 == 1906


def test_exporting_what_was_imported_of_the_released_checkpoint_reproduces_its_list(tmp_path):
    plan = plan_import([MANIFEST], configs.read_config("chroma_4b"), Config)
    (account,) = plan.accounts
    shapes = abstract_weights(plan.config.model)
    stored = {r.path: jax.ShapeDtypeStruct(shapes[r.path].shape, np.dtype(account.dtype(r))) for r in account.rows}
    found = {
        x.name: {"shape": list(x.shape), "dtype": x.dtype} for x in tensors_of(plan.config, stored, tmp_path / "none", "stored")
    }
    carried = {released: account.header[name] for name, released in account.carried.items()}
    assert len(found) == 1388 and len(carried) == 518
    found |= {name: {"shape": list(x.shape), "dtype": x.dtype} for name, x in carried.items()}
    manifest = json.loads(MANIFEST.read_text())
    assert found == {name: {"shape": list(x["shape"]), "dtype": x["dtype"]} for name, x in manifest.items()}


def test_the_command_accounts_for_a_manifest_without_writing(tmp_path, capsys):
    assert main(["convert", "import", str(MANIFEST), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "518 of vision" in capsys.readouterr().out
    assert main(["convert", "import", str(MANIFEST), str(tmp_path / "out")]) == 2
    assert "a manifest has no weights" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# There and back


ALONE, DIVIDED = ["--mesh.fsdp", "1"], ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [ALONE, DIVIDED], ids=["alone", "divided"])
def test_import_and_export_give_every_bit_back(source, onto, tmp_path, mesh):
    run, back = tmp_path / "run", tmp_path / "back"
    as_compiled_by_default("convert", "import", source, run, "--onto", onto, "--keep-unused", *mesh)
    as_compiled_by_default("export", run, back, "--shard-gb", "0.0001")
    assert_same(all_in(back), all_in(source))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = {p.name for p in back.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 3
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in all_in(source).values())
    config = json.loads((back / "config.json").read_text())
    assert config["thinker_config"]["vision_config"] == {"depth": 1}  # unknown to us, and kept
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def as_compiled_by_default(*command) -> None:
    """Runs a command of its own, without the tests' way to compile quickly, in which a NaN among the bits may be changed."""
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "chroma_jax", *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.compilations(400)
def test_without_keep_unused_only_vision_is_missing_and_it_is_said(source, tmp_path):
    run = imported(tmp_path / "run", source)
    export_checkpoint(run, tmp_path / "back")
    theirs = {name: x for name, x in all_in(source).items() if name not in VISION}
    assert_same(all_in(tmp_path / "back"), theirs)
    said = json.loads((run / "import.json").read_text())
    assert "  not read: 2 of vision, which a speaking model does not have" in said[0]["account"]


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of the NaN among the random bits
def test_another_type_is_written_when_asked_for(source, tmp_path):
    run = imported(tmp_path / "run", source)
    export_checkpoint(run, tmp_path / "back", "bfloat16")
    for name, x in all_in(tmp_path / "back").items():
        assert x.dtype == (np.float32 if name.startswith("codec_model.") else BFLOAT16), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_whole_chroma_brings_its_own_sizes(source, tmp_path):
    plan = plan_import([source], None, Config)
    assert plan.config.model == MODEL


@pytest.mark.compilations(300)
def test_weights_are_read_straight_to_where_training_keeps_them(source):
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2, tensor=2))
    plan = plan_import([source], config, Config)
    rows = [row for row in plan.accounts[0].rows if row.part != "codec"]
    weights = read_weights(rows, plan.accounts[0].header, place(plan))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = trainer_of(config, mesh)
    expected = values(trainer.abstract.trained)
    assert weights.keys() == expected.keys()
    for path, x in weights.items():
        assert x.sharding.spec == expected[path].sharding.spec, path
    gate = weights["reasoner/text/blocks/gate/kernel"]
    assert gate.addressable_shards[0].data.size == gate.size // 4


# Warm starts: other checkpoints, written here from known weights of ours


def foreign(
    rows: list[names.NameRow], rng: np.random.Generator, extend: Mapping[str, int] = MappingProxyType({})
) -> tuple[dict, dict]:
    """(tensors under foreign names, the weights of ours that they are, by path). extend: path → foreign rows past ours."""
    shapes, tensors = abstract_weights(MODEL), {}
    ours = {row.path: rng.normal(size=shapes[row.path].shape).astype(np.float32) for row in rows}
    for row in rows:
        for layer, name in enumerate(row.foreign_names()):
            one = row.transform.to_foreign(ours[row.path] if row.layers is None else ours[row.path][layer])
            if row.path in extend:
                one = np.concatenate([one, rng.normal(size=(extend[row.path], *one.shape[1:])).astype(np.float32)])
            tensors[name] = np.ascontiguousarray(one)
    return tensors, ours


def csm_config() -> dict:
    scaled = dataclasses.replace(MODEL.backbone, rope=csm_rope(1024)), dataclasses.replace(MODEL.decoder, rope=csm_rope(16))
    backbone, decoder = map(llama_to_hf, scaled)
    return {"model_type": "csm", **backbone, "depth_decoder_config": decoder}


LATER = {"audio_embedding/rows/table": 3 * tiny.CODES, "decoder/heads": 3}  # three more codebooks than ours


def qwen(rng, prefix: str):
    tensors, ours = foreign(names.reasoner_rows(MODEL, prefix), rng)
    tensors |= {f"{prefix}visual.blocks.0.weight": np.zeros((2, 2), np.float32)}
    return tensors | ({"talker.model.norm.weight": np.zeros(3, np.float32)} if prefix else {}), ours, None


def csm(rng):
    text = np.zeros((7, 2), np.float32)
    tensors, ours = foreign(names.csm_rows(MODEL), rng, LATER)
    tied = {"backbone_model.embed_tokens.embed_audio_tokens.weight": tensors["depth_decoder.model.embed_tokens.weight"]}
    return tensors | tied | {"embed_text_tokens.weight": text}, ours, csm_config()


def csm_tied(rng):
    tensors, ours = foreign(names.csm_rows(MODEL), rng, LATER)
    table = tensors.pop("depth_decoder.model.embed_tokens.weight")
    codec, codec_ours = foreign(names.codec_rows(MODEL), rng)
    tensors |= codec | {"backbone_model.embed_tokens.embed_audio_tokens.weight": table}
    return tensors, ours | codec_ours, csm_config()


def sesame(rng):
    tensors, ours = foreign(names.csm_sesame_rows(MODEL), rng, LATER)
    return tensors | {"text_embeddings.weight": np.zeros((7, 2), np.float32)}, ours, None


def mimi(rng, prefix: str):
    tensors, ours = foreign(names.codec_rows(MODEL, prefix), rng)
    last = MODEL.codec.num_codebooks - MODEL.codec.quantizer.num_semantic
    for name in ("embed_sum", "cluster_usage", "initialized"):  # one codebook more than ours
        layer = f"{prefix}quantizer.acoustic_residual_vector_quantizer.layers.%d.codebook.{name}"
        tensors[layer % last] = np.zeros_like(tensors[layer % 0])
    return tensors, ours, None


SOURCES = {
    "Qwen2.5-Omni": lambda rng: qwen(rng, "thinker."),
    "Qwen2.5-Omni's thinker alone": lambda rng: qwen(rng, ""),
    "CSM in Hugging Face's naming": csm,
    "CSM with its Codec, table tied": csm_tied,
    "CSM in Sesame's naming": sesame,
    "Mimi": lambda rng: mimi(rng, ""),
    "Mimi inside of another model": lambda rng: mimi(rng, "codec_model."),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, dict[str, np.ndarray]]]:
    base, made = tmp_path_factory.mktemp("sources"), {}
    for i, (name, make) in enumerate(SOURCES.items()):
        tensors, ours, config = make(np.random.default_rng(i))
        made[name] = write(base / str(i), tensors, config, files=1), ours
    return made


@pytest.mark.parametrize("name", SOURCES)
def test_a_warm_start_has_the_sources_weights(checkpoints, tmp_path, name):
    source, ours = checkpoints[name]
    run = imported(tmp_path / "run", source)
    found = weights_of(run) if set(ours) - {p for p in ours if p.startswith("codec/")} else {}
    if any(path.startswith("codec/") for path in ours):
        found |= {path: np.asarray(x) for path, x in values(read_codec(run / "codec.safetensors", MODEL), "codec/").items()}
    assert found.keys() == ours.keys()
    for path, x in found.items():
        np.testing.assert_array_equal(x, ours[path], err_msg=path)


def test_frequencies_that_the_weights_were_trained_with_come_along(checkpoints, tmp_path):
    for name in ("CSM in Hugging Face's naming", "CSM in Sesame's naming"):
        plan = plan_import([checkpoints[name][0]], CONFIG, Config)
        assert plan.config.model.backbone.rope == csm_rope(1024) and plan.config.model.decoder.rope == csm_rope(16)
        assert any("rope" in line.lower() for line in plan.lines())
    assert plan.config.model.reasoner == MODEL.reasoner
    # the values of CSM-1B's published configuration, which Chroma's documentation also gives
    assert (csm_rope(16).low_freq_factor, csm_rope(16).high_freq_factor) == (0.001953125, 0.0078125)
    assert (csm_rope(1024).low_freq_factor, csm_rope(1024).high_freq_factor) == (0.125, 0.5)


def test_neighbouring_channels_and_halves_rotate_to_the_same_scores():
    heads, head, width, length = 3, 8, 16, 5
    rng = np.random.default_rng(0)
    foreign_q, foreign_k = rng.normal(size=(2, heads * head, width))
    x = rng.normal(size=(1, length, width))
    cos, sin = rope.rotation(rope.RopeConfig(), head, jnp.arange(length)[None])

    def pairs(weight):  # as torchtune rotates: channels 2j and 2j + 1 together
        y = (x @ weight.T).reshape(1, length, heads, head // 2, 2)
        c, s = (np.asarray(x)[:, :, None, : head // 2] for x in (cos, sin))  # one angle a pair
        return np.stack([y[..., 0] * c - y[..., 1] * s, y[..., 1] * c + y[..., 0] * s], -1).reshape(1, length, heads, head)

    def halves(weight):
        ours = ROTARY_PAIRS.to_ours(weight, (width, heads, head))
        return np.asarray(rope.rotate(jnp.einsum("btd,dnh->btnh", x, ours), cos, sin))

    scores = lambda q, k: np.einsum("btnh,bsnh->bnts", q, k)
    np.testing.assert_allclose(
        scores(halves(foreign_q), halves(foreign_k)), scores(pairs(foreign_q), pairs(foreign_k)), rtol=1e-4, atol=1e-4
    )  # float32
    np.testing.assert_array_equal(ROTARY_PAIRS.to_foreign(ROTARY_PAIRS.to_ours(foreign_q, (width, heads, head))), foreign_q)


def test_three_sources_make_a_whole_model_that_exports(checkpoints, tmp_path):
    chosen = ("Qwen2.5-Omni", "CSM in Sesame's naming", "Mimi")
    run = imported(tmp_path / "run", *(checkpoints[name][0] for name in chosen))
    export_checkpoint(run, tmp_path / "back")
    plan = plan_import([tmp_path / "back"], None, Config)
    assert not plan.missing and plan.config.model.backbone.rope == csm_rope(1024)
    again = imported(tmp_path / "again", tmp_path / "back", config=None)
    expected = {path: x for name in chosen for path, x in checkpoints[name][1].items() if not path.startswith("codec/")}
    found = weights_of(again)
    assert found.keys() == expected.keys()
    for path, x in found.items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)


def test_of_a_part_that_two_sources_have_the_first_is_taken_and_it_is_said(checkpoints, source, tmp_path):
    mimi_source, ours = checkpoints["Mimi"]
    plan = plan_import([mimi_source, source], CONFIG, Config)
    assert any("which an earlier source gives" in line for line in plan.lines())
    run = imported(tmp_path / "run", mimi_source, source)
    codec = values(read_codec(run / "codec.safetensors", MODEL), "codec/")
    assert all(np.array_equal(codec[path], x) for path, x in ours.items())


def test_prepare_takes_a_codec_in_mimis_own_names(checkpoints):
    source, ours = checkpoints["Mimi"]
    found = values(read_codec(source, MODEL), "codec/")
    assert all(np.array_equal(found[path], x) for path, x in ours.items())
    with pytest.raises(InputError, match="has no Codec"):
        read_codec(checkpoints["CSM in Sesame's naming"][0], MODEL)


# Training from it


def expected(trainer) -> dict[str, jax.ShapeDtypeStruct]:
    return values(trainer.abstract.trained) | values(trainer.abstract.frozen)


@pytest.mark.parametrize("mesh", [MeshConfig(), pytest.param(MeshConfig(fsdp=2), marks=pytest.mark.slow)], ids=["one", "sharded"])
def test_training_starts_from_what_was_imported_and_draws_the_rest(checkpoints, tmp_path, capsys, mesh):
    source, ours = checkpoints["Qwen2.5-Omni"]
    run, mesh = imported(tmp_path / "run", source), make_mesh(mesh)
    with jax.set_mesh(mesh):
        trainer = trainer_of(CONFIG, mesh)
        state = trainer.init(starting_weights(CONFIG, run, expected(trainer)))
        fresh = trainer.init()
    assert "drawn at random: audio_embedding, backbone, decoder" in capsys.readouterr().out
    found, drawn = values(state.trained), values(fresh.trained)
    for path, x in found.items():
        np.testing.assert_array_equal(x, ours.get(path, drawn[path]), err_msg=path)


def test_training_refuses_weights_of_another_model_and_says_the_flags(checkpoints, tmp_path):
    run = imported(tmp_path / "run", checkpoints["CSM in Sesame's naming"][0])
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        trainer = trainer_of(CONFIG, mesh)
        with pytest.raises(InputError, match=r"--model\.backbone\.rope\.scaling llama3 .*--model\.decoder\.rope"):
            starting_weights(CONFIG, run, expected(trainer))


@pytest.mark.slow
def test_a_run_starts_from_an_import_and_leaves_it_alone(source, tiny_prepared, onto, tmp_path, capsys):
    config, prepared = tiny_prepared
    finite = write(tmp_path / "finite", {name: np.full_like(x, 0.01) for name, x in all_in(source).items()})
    start = imported(tmp_path / "imported", finite, config=config, unused="keep")
    before = {p: p.read_bytes() for p in start.rglob("*") if p.is_file()}
    flags = ["--dataset_dir", str(prepared), "--data.corpus", config.data.corpus, "--training.steps", "1"]
    assert main(["train", onto, str(tmp_path / "run"), *flags, "--init-from", str(start)]) == 0
    assert "initializing from" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in start.rglob("*") if p.is_file()} == before
    embedding = weights_of(tmp_path / "run")["reasoner/embedding/table"]
    assert np.abs(embedding - 0.01).max() < 0.02  # one step of Adam at a learning rate of 0.01 away
    (tmp_path / "run" / "codec.safetensors").write_bytes((start / "codec.safetensors").read_bytes())  # the data has none
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    back, given = all_in(tmp_path / "back"), all_in(finite)
    assert back.keys() == given.keys() and all(back[name].tobytes() == given[name].tobytes() for name in VISION)
    assert main(["train", onto, str(shutil.copytree(start, tmp_path / "copy")), *flags]) == 2
    assert "weights alone, as an import leaves them; train another run folder with --init-from" in capsys.readouterr().err


def test_a_part_that_is_missing_is_named(checkpoints, tmp_path):
    run = imported(tmp_path / "run", checkpoints["Qwen2.5-Omni"][0], checkpoints["Mimi"][0])
    for use in (lambda: load_run(run, configs.load(run)), lambda: export_checkpoint(run, tmp_path / "back")):
        with pytest.raises(InputError, match="no weights of backbone, decoder, audio_embedding.*--init-from"):
            use()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


# What does not fit


def refused(sources, tmp_path: Path, *words: str, config: Config | None = CONFIG) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        imported(tmp_path / "dest", *sources, config=config)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    tensors = released()
    del tensors["backbone.codebook0_head.weight"], tensors["thinker.model.layers.1.mlp.up_proj.weight"]
    tensors["decoder.projection.weight"] = np.zeros((2, 3), np.float32)
    tensors["codec_model.decoder.layers.99.conv.bias"] = np.zeros(2, np.float32)
    tensors["backbone.model.norm.weight"] = np.zeros(32, np.int64)
    tensors["backbone.codebook0_head.weight.bad"] = np.zeros(1, np.float32)
    source = write(tmp_path / "source", tensors | {"backbone.codebook0_head.weight": np.zeros((61, 32), np.int32)})
    refused(
        [source],
        tmp_path,
        "nothing was written",
        "6 tensors do not fit",
        "missing: thinker.model.layers.1.mlp.up_proj.weight",
        "misshapen: decoder.projection.weight is [2, 3], expected [24, 32]",
        "extra: codec_model.decoder.layers.99.conv.bias",
        "extra: backbone.codebook0_head.weight.bad",
        "wrong type: backbone.model.norm.weight is I64",
        "wrong type: backbone.codebook0_head.weight is I32",
    )


def test_two_sources_that_do_not_fit_are_both_listed(checkpoints, tmp_path):
    first, second = (write(tmp_path / n, dict(all_in(checkpoints[k][0]))) for n, k in (("a", "Qwen2.5-Omni"), ("b", "Mimi")))
    for folder, name in ((first, "thinker.lm_head.weight"), (second, "downsample.conv.weight")):
        tensors = all_in(folder)
        tensors[name] = np.zeros((1, 1), np.float32)
        shutil.rmtree(folder)
        write(folder, tensors)
    refused([first, second], tmp_path, "misshapen: thinker.lm_head.weight", "misshapen: downsample.conv.weight")


def test_what_two_sources_would_keep_unused_is_kept_once(checkpoints, source, tmp_path):
    qwen_source, _ = checkpoints["Qwen2.5-Omni"]
    run = imported(tmp_path / "run", source, qwen_source, unused="keep")
    kept = load_file(run / "unused.safetensors")
    assert set(kept) == {*VISION, "thinker.visual.blocks.0.weight"}
    assert all(kept[name].tobytes() == all_in(source)[name].tobytes() for name in VISION)


def test_another_models_config_is_named_by_field(checkpoints, tmp_path):
    source = write(
        tmp_path / "source", all_in(checkpoints["CSM in Hugging Face's naming"][0]), csm_config() | {"num_hidden_layers": 9}
    )
    refused([source], tmp_path, "backbone.num_hidden_layers is 9, the configuration says 2")


@pytest.mark.parametrize(
    "damage, words",
    [
        ("unknown", ["no checkpoint that is known", "Qwen2.5-Omni", "something.else"]),
        ("absent", ["no safetensors file there"]),
        ("cut", ["model-1.safetensors", "not a readable safetensors file"]),
        ("shard", ["names shards that are missing", "model-1.safetensors"]),
        ("index", ["not an index"]),
        ("twice", ["is both in"]),
        ("config", ["config.json", "not JSON"]),
        ("manifest", ["not a manifest"]),
    ],
)
def test_a_damaged_source_is_named(source, tmp_path, damage, words):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    file, index = folder / "model-1.safetensors", folder / "model.safetensors.index.json"
    if damage == "unknown":
        shutil.rmtree(folder)
        write(folder, {"something.else.weight": np.zeros(1, np.float32)})
    elif damage == "absent":
        shutil.rmtree(folder)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "shard":
        file.unlink()
    elif damage == "index":
        index.write_text("[]")
    elif damage == "twice":
        index.unlink()
        shutil.copyfile(file, folder / "model-3.safetensors")
    elif damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "manifest":
        folder = tmp_path / "manifest.json"
        folder.write_text('{"a": 1}')
    refused([folder], tmp_path, *words, config=None if damage == "config" else CONFIG)


def test_a_folder_with_something_in_it_is_left_alone(source, tmp_path):
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "precious").write_text("keep me")
    refused([source], tmp_path, "dest", "exists already")


@pytest.mark.parametrize("moment", ["read_weights", "write_safetensors", "write_json"])
def test_an_interrupted_import_leaves_nothing_and_can_be_run_again(source, tmp_path, monkeypatch, moment):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importer, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            imported(tmp_path / "run", source)
    assert not list(tmp_path.iterdir())
    assert imported(tmp_path / "run", source).is_dir()


def test_what_a_killed_import_left_is_cleared_by_the_next_one(source, tmp_path):
    (tmp_path / ".run.partial").mkdir()
    (tmp_path / ".run.partial" / "half").write_text("")
    dead = dataclasses.replace(Owner.this(), process=999_999_999)
    (tmp_path / ".run.lock.0").write_text(json.dumps(dataclasses.asdict(dead)))
    imported(tmp_path / "run", source)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not (tmp_path / "run" / "half").exists()


def test_an_interrupted_export_leaves_nothing(source, tmp_path, monkeypatch):
    run = imported(tmp_path / "run", source)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("chroma_jax.convert.export.write_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(run, tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
