"""What we export loads into transformers' own classes and computes the same there; what these classes save, we import and compute
the same. Random weights and inputs. Needs the ``dev`` extra (torch, transformers)."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

from chroma_jax import config as configs
from chroma_jax.config import Config
from chroma_jax.convert.export import export_checkpoint
from chroma_jax.convert.importer import import_sources, plan_import
from chroma_jax.convert.sources import read_codec
from chroma_jax.models.audio_encoder import cut_blocks, num_outputs
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.models.io.name_tables import chroma_rows, codec_rows, csm_rows
from chroma_jax.models.io.weight_files import abstract_weights, outputs, write_safetensors
from chroma_jax.runs.load import exported_config
from chroma_jax.sequence.interleave import NONE_TOKEN
from chroma_jax.training.checkpoint import Checkpoints
from chroma_jax.utils.tree_paths import filled

pytestmark = pytest.mark.slow
torch = transformers = None  # imported when a test runs, so that the fast tests need neither


@pytest.fixture(scope="module", autouse=True)
def upstream():
    global torch, transformers
    import torch
    import transformers


LEVELS, VOCABULARY = 4, 67
# float32, two implementations that add up in different orders; values are around 1
SAME = {"rtol": 1e-4, "atol": 1e-4}
# sharp attention of random weights makes rounding grow: the median difference is 2e-5, one logit in ten thousand is 3e-4 apart
LOGITS = {"rtol": 0, "atol": 1e-3}


def model_config():
    """Mimi in transformers wants a power of two of codes."""
    config = dataclasses.replace(tiny.model(), audio_vocab_size=VOCABULARY, codebook_pad_token_id=VOCABULARY - 1)
    return tiny.replace(config, "codec.quantizer.codebook_size", 64)


MODEL = model_config()
CONFIG = dataclasses.replace(tiny.config(), model=MODEL)
RNG = np.random.default_rng(0)


def tensor(x):
    return torch.from_numpy(np.ascontiguousarray(x))


@pytest.fixture(scope="module")
def weights() -> dict[str, jax.Array]:
    """All of ours by path, random; norms near one, and codebooks that have been used."""

    def one(path: str, x: jax.ShapeDtypeStruct) -> jax.Array:
        last = path.rsplit("/", 1)[-1]
        if last == "initialized":
            return jnp.ones(x.shape, x.dtype)
        if last == "cluster_usage":
            return jnp.asarray(RNG.uniform(0.5, 3, x.shape), x.dtype)
        fan = {"scale": 100, "bias": 25, "embed_sum": 1}.get(last, x.shape[-2] if len(x.shape) > 1 else 1)
        return jnp.asarray(RNG.normal(size=x.shape) * fan**-0.5 + (last == "scale"), x.dtype)

    return {path: one(path, x) for path, x in abstract_weights(MODEL).items()}


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory) -> Path:
    """Through the commands' own path: a checkpoint, then an export."""
    run = tmp_path_factory.mktemp("upstream") / "run"
    run.mkdir()
    (run / "config.txt").write_text(configs.dump(CONFIG))
    with Checkpoints(run, CONFIG.checkpoint) as checkpoints:
        checkpoints.save_weights({path: x for path, x in weights.items() if not path.startswith("codec/")})
    write_safetensors(run / "codec.safetensors", list(outputs(weights, codec_rows(MODEL))))
    export_checkpoint(run, run.parent / "exported")
    return run.parent / "exported"


@pytest.fixture(scope="module")
def ours(weights) -> tuple[Chroma, Codec]:
    def module(make, prefix):
        graph, state = nnx.split(nnx.eval_shape(make))
        return nnx.merge(graph, filled(state, weights, prefix))

    return module(lambda: Chroma(nnx.Rngs(0), MODEL), ""), module(lambda: Codec(nnx.Rngs(0), MODEL.codec), "codec/")


def exported_part(exported: Path, prefix: str) -> dict[str, np.ndarray]:
    """The tensors that begin with a prefix, which is cut off."""
    found = {}
    for file in exported.glob("*.safetensors"):
        found |= {n.removeprefix(prefix): x for n, x in load_file(file).items() if n.startswith(prefix)}
    return found


def loaded(theirs, tensors: dict[str, np.ndarray], folder: Path):
    """The class of ``theirs`` with these tensors, read by its own from_pretrained: (model, names that it misses).

    A tensor that it does not know is an error.
    """
    theirs.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, found = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not found["unexpected_keys"] and not found["mismatched_keys"]
    return model.eval().float(), set(found["missing_keys"])


def config_json(exported: Path) -> dict:
    return json.loads((exported / "config.json").read_text())


def imported(source: Path, dest: Path) -> tuple[dict[str, jax.Array], Config]:
    """Weights by path and the configuration that an import writes."""
    import_sources(plan_import([source], CONFIG, Config), dest)
    config = configs.load(dest)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(dest, config.checkpoint, access="read") as checkpoints:
        held = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first) for p, x in checkpoints.held().items()}
        return checkpoints.restore_weights(held), config


# Reasoner


def thinker(exported: Path):
    section = config_json(exported)["thinker_config"]
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 2}
    marks = {"vision_start_token_id": 490, "vision_end_token_id": 491, "image_token_index": 492, "video_token_index": 493}
    config = transformers.models.qwen2_5_omni.configuration_qwen2_5_omni.Qwen2_5OmniThinkerConfig(
        **section, **marks, vision_config=vision, attn_implementation="eager"
    )
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration(config).eval().float()


def asked() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [L] with places for a recording of 330 mel frames, its features [frames, bins], and which output stands where."""
    mel = RNG.normal(size=(330, MODEL.reasoner.audio.mel_bins)).astype(np.float32)
    places, t = num_outputs(len(mel)), MODEL.tokens
    tokens = np.concatenate([[5, 9, t.audio_start], np.full(places, t.audio), [t.audio_end, 77, 300]]).astype(np.int32)
    index = np.full(len(tokens), NONE_TOKEN, np.int32)
    index[tokens == t.audio] = np.arange(places)
    return tokens, mel, index


def our_logits(model: Chroma, tokens, mel, index) -> np.ndarray:
    blocks, lengths = cut_blocks(mel, MODEL.reasoner.audio.block_frames)
    order, one = np.arange(len(tokens))[None], np.ones((1, len(tokens)), np.int32)

    @jax.jit
    def heard(m, blocks, lengths, *text):
        return m.reasoner.logits(m.reasoner.read(m.reasoner.audio(blocks, lengths), *text))

    return np.asarray(heard(model, blocks[None], lengths[None], tokens[None], order, one, index[None]))[0]


def their_logits(theirs, tokens, mel) -> np.ndarray:
    with torch.no_grad():
        out = theirs(
            input_ids=tensor(tokens[None].astype(np.int64)),
            input_features=tensor(mel.T[None]),
            feature_attention_mask=torch.ones(1, len(mel), dtype=torch.long),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        )
    return out.logits[0].numpy()


def test_the_exported_reasoner_is_transformers_qwen_thinker(exported, ours, tmp_path):
    theirs, missing = loaded(thinker(exported), exported_part(exported, "thinker."), tmp_path)
    assert all("visual" in name for name in missing)
    tokens, mel, index = asked()
    found = our_logits(ours[0], tokens, mel, index)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, their_logits(theirs, tokens, mel), **LOGITS)


def test_a_qwen_thinker_that_transformers_saved_is_imported(exported, ours, tmp_path):
    torch.manual_seed(1)
    theirs = thinker(exported)
    theirs.save_pretrained(tmp_path / "theirs")
    weights, config = imported(tmp_path / "theirs", tmp_path / "run")
    graph, state = nnx.split(ours[0])
    model = nnx.merge(graph, filled(state, weights))
    assert config.model == MODEL
    tokens, mel, index = asked()
    np.testing.assert_allclose(our_logits(model, tokens, mel, index), their_logits(theirs, tokens, mel), **LOGITS)


# Codec


def waves() -> np.ndarray:
    return (0.3 * RNG.normal(size=(2, 5 * MODEL.codec.samples_per_frame - 700))).astype(np.float32)


def mimi(section: dict):
    """Without the attention window, which transformers' releases treat differently; the recordings are shorter than it anyway."""
    config = transformers.MimiConfig(**section | {"sliding_window": 250})
    return transformers.MimiModel(config).eval().float()


def check_codec(codec: Codec, theirs) -> None:
    audio = waves()
    with torch.no_grad():
        codes = theirs.encode(tensor(audio[:, None]), num_quantizers=LEVELS).audio_codes
        sound = theirs.decode(codes).audio_values[:, 0].numpy()
    found = np.asarray(jax.jit(lambda c, x: c.encode(x))(codec, audio))
    np.testing.assert_array_equal(np.moveaxis(found, 1, 2), codes.numpy())
    assert len(np.unique(found)) > 10
    loudest = np.abs(sound).max()
    np.testing.assert_allclose(jax.jit(lambda c, x: c.decode(x))(codec, found) / loudest, sound / loudest, **SAME)


def test_the_exported_codec_is_transformers_mimi(exported, ours, tmp_path):
    theirs, missing = loaded(mimi(config_json(exported)["codec_config"]), exported_part(exported, "codec_model."), tmp_path)
    assert not missing
    check_codec(ours[1], theirs)


def test_a_mimi_that_transformers_saved_is_imported(exported, tmp_path):
    torch.manual_seed(2)
    theirs = mimi(config_json(exported)["codec_config"])
    for name, buffer in theirs.named_buffers():  # the classes begin with codebooks of zeros
        if name.endswith("embed_sum"):
            torch.nn.init.normal_(buffer)
    theirs.save_pretrained(tmp_path / "theirs")
    import_sources(plan_import([tmp_path / "theirs"], CONFIG, Config), tmp_path / "run")
    check_codec(read_codec(tmp_path / "run" / "codec.safetensors", configs.load(tmp_path / "run").model), theirs)


# Backbone and Decoder, which are CSM's


def csm(exported: Path, levels: int = LEVELS):
    said = config_json(exported)
    shape = {"num_codebooks": levels, "vocab_size": VOCABULARY, "codebook_pad_token_id": VOCABULARY - 1, "pad_token_id": 0}
    config = transformers.CsmConfig(
        **{k: v for k, v in said["backbone_config"].items() if k not in ("model_type", "audio_num_codebooks", "vocab_size")},
        **shape,
        text_vocab_size=20,
        depth_decoder_config={
            **{k: v for k, v in said["decoder_config"].items() if k not in ("model_type", "vocab_size")},
            **{k: v for k, v in shape.items() if k != "codebook_pad_token_id"},
            "backbone_hidden_size": MODEL.backbone.hidden_size,
        },
        codec_config=said["codec_config"] | {"model_type": "mimi"},
        bos_token_id=1,
        audio_token_id=2,
        audio_eos_token_id=3,
        attn_implementation="eager",
    )
    return transformers.CsmForConditionalGeneration(config).eval().float()


def our_heads(model: Chroma, inputs: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits of codebook 0 [T, V], and of the others at the last position [Q−1, V]. inputs: [T, D]; codes: [Q], next frame."""

    def run(model, inputs, codes):
        order = jnp.arange(inputs.shape[1])[None]
        hidden = model.backbone(inputs, order, jnp.ones_like(order))
        return model.backbone.logits(hidden)[0], model.frame_logits(hidden[0, -1:], codes[None])[0]

    return tuple(map(np.asarray, jax.jit(run)(model, inputs[None], codes)))


def their_heads(theirs, inputs: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        hidden = theirs.backbone_model(inputs_embeds=tensor(inputs[None])).last_hidden_state
        ids = tensor(np.concatenate([[0], codes[:-1]])[None].astype(np.int64))  # the first place is the hidden state's
        depth = theirs.depth_decoder(input_ids=ids, backbone_last_hidden_state=hidden[:, -1]).logits
        return theirs.lm_head(hidden)[0].numpy(), depth[0, -len(codes) + 1 :].numpy()


def check_heads(model: Chroma, theirs) -> None:
    inputs = RNG.normal(size=(11, MODEL.backbone.hidden_size)).astype(np.float32)
    codes = RNG.integers(0, 64, LEVELS).astype(np.int32)
    for found, expected in zip(our_heads(model, inputs, codes), their_heads(theirs, inputs, codes), strict=True):
        assert found.std() > 1e-3
        np.testing.assert_allclose(found, expected, **SAME)


def test_the_exported_backbone_and_decoder_are_transformers_csm(exported, ours, tmp_path):
    names = {}
    released = [row for row in chroma_rows(MODEL) if row.part in ("backbone", "decoder")]
    renamed = {row.path: row for row in csm_rows(MODEL)}
    for row in released:  # two tables, one weight
        names |= dict(zip(row.foreign_names(), renamed[row.path].foreign_names(), strict=True))
    tensors = {names[name]: x for name, x in exported_part(exported, "").items() if name in names}
    tensors["backbone_model.embed_tokens.embed_audio_tokens.weight"] = tensors["depth_decoder.model.embed_tokens.weight"]
    theirs, missing = loaded(csm(exported), tensors, tmp_path)
    assert all(name.startswith(("codec_model.", "embed_text_tokens.")) for name in missing)
    check_heads(ours[0], theirs)


@pytest.mark.parametrize("levels", [LEVELS, LEVELS + 2])
def test_a_csm_that_transformers_saved_is_imported(exported, ours, tmp_path, levels):
    torch.manual_seed(3)
    theirs = csm(exported, levels)
    torch.nn.init.normal_(theirs.depth_decoder.codebooks_head.weight, std=0.2)  # the class begins with zeros
    theirs.save_pretrained(tmp_path / "theirs")
    weights, config = imported(tmp_path / "theirs", tmp_path / "run")
    graph, state = nnx.split(ours[0])
    model = nnx.merge(graph, filled(state, weights))
    assert config.model.backbone == MODEL.backbone and config.model.decoder == MODEL.decoder
    assert (tmp_path / "run" / "codec.safetensors").is_file()  # CSM brings its own
    assert exported_config(exported / "config.json").backbone == MODEL.backbone
    check_heads(model, theirs)
