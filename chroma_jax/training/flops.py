"""Parameters, bytes and floating-point operations of a configuration, counted from its shapes."""

import collections
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage]: JAX does not mark it as exported

from chroma_jax.layers.transformer import LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec, CodecConfig
from chroma_jax.sequence.batch import PackedShape
from chroma_jax.training.codec.discriminator import Discriminator
from chroma_jax.training.loss import LossConfig
from chroma_jax.utils.errors import InputError


def llama(c: LlamaConfig, positions: int, context: float) -> float:
    """Forward FLOPs of a stack over ``positions`` positions that see ``context`` positions each, on average."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    weights = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    return 2 * positions * weights + 4 * positions * context * c.num_hidden_layers * c.num_attention_heads * c.head_dim


def audio_encoder(c: AudioEncoderConfig) -> float:
    """Forward FLOPs of one block."""
    frames, positions = c.block_frames, c.block_frames // 2
    convolutions = 6 * frames * c.mel_bins * c.hidden_size + 6 * positions * c.hidden_size**2
    layers = c.num_hidden_layers * (
        2 * positions * (4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size) + 4 * positions**2 * c.hidden_size
    )
    return convolutions + layers + positions * c.hidden_size * c.output_dim


class PartFlops(NamedTuple):
    """Forward FLOPs of one packed row, by part, at the row's full capacity (padding is computed too)."""

    audio_encoder: float
    text_model: float
    backbone: float
    decoder: float


def forward_flops(model: ChromaConfig, row: PackedShape, loss: LossConfig) -> PartFlops:
    """Causal attention counts half of the square; heads count the positions they are applied to."""
    c, q = model, model.num_codebooks
    text = llama(c.reasoner.text, row.text, row.text / 2)
    if loss.text_weight:
        text += 2 * row.answers * c.reasoner.text.hidden_size * c.reasoner.vocab_size
    if loss.ctc_weight:
        text += 2 * row.blocks * (c.reasoner.audio.block_frames // 4) * c.reasoner.text.hidden_size * c.reasoner.vocab_size
    if not loss.speech_weight:
        return PartFlops(row.blocks * audio_encoder(c.reasoner.audio), text, 0, 0)
    targets = row.frames + loss.prompt_slots
    backbone = llama(c.backbone, row.positions, row.positions / 2) + 2 * targets * c.backbone.hidden_size * c.audio_vocab_size
    frame = llama(c.decoder, q, q / 2) + 2 * q * c.backbone.hidden_size * c.decoder.hidden_size
    frame += 2 * (q - 1) * c.decoder.hidden_size * c.audio_vocab_size
    frames = sum(math.ceil(slots * loss.decoder_frame_fraction) for slots in (row.frames, loss.prompt_slots))
    return PartFlops(row.blocks * audio_encoder(c.reasoner.audio), text, backbone, frames * frame)


def step_flops(model: ChromaConfig, row: PackedShape, loss: LossConfig, rows: int, trained: Iterable[str]) -> PartFlops:
    """FLOPs of a training step, by part: the definition of MFU.

    The backward pass costs twice the forward pass where weights are trained, and as much as it where gradients only pass
    through. Nothing is computed below the last trained weight. Rematerialization does not count.

    Args:
        model: Sizes of the model.
        row: Capacity of a packed sequence.
        loss: Which losses there are.
        rows: Packed sequences of a step.
        trained: Paths of the trained weights.
    """
    paths = list(trained)
    trains = lambda *prefixes: any(path.startswith(prefixes) for path in paths)
    audio = trains("reasoner/audio")
    text = any(path.startswith("reasoner/") and not path.startswith("reasoner/audio") for path in paths)
    has = (audio, text, trains("backbone/", "audio_embedding/"), trains("decoder/"))
    below = (False, audio, audio or text, has[2])
    passes = (1 + 2 * own + (through and not own) for own, through in zip(has, below))
    return PartFlops(*(rows * part * times for part, times in zip(forward_flops(model, row, loss), passes)))


class PartSize(NamedTuple):
    """Weights of one part."""

    name: str
    parameters: int


def part_sizes(model: ChromaConfig) -> list[PartSize]:
    """Parameters by part; counted from abstract shapes, so the 4B configuration costs no memory. The table of audio
    embeddings is the Decoder's, as in the released checkpoint's names."""
    speaking = nnx.eval_shape(lambda: Chroma(nnx.Rngs(0), model))
    codec = nnx.eval_shape(lambda: Codec(nnx.Rngs(0), model.codec))

    def count(module) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module)))

    reasoner, audio = count(speaking.reasoner), count(speaking.reasoner.audio)
    return [
        PartSize("Reasoner: audio encoder", audio),
        PartSize("Reasoner: text model", reasoner - audio),
        PartSize("Backbone", count(speaking.backbone)),
        PartSize("Decoder (with the audio embedding)", count(speaking.decoder) + count(speaking.audio_embedding)),
        PartSize("Codec", count(codec) - codebook_values(model.codec)),
    ]


def frame_bytes(model: ChromaConfig, dtype=jnp.bfloat16) -> float:
    """Weight bytes that one reply frame has to read: the text model every other frame, Backbone, the Decoder seven times,
    the Codec's decoder half, each once; the embedding tables only by row."""
    c, size = model, jnp.dtype(dtype).itemsize
    text = sum(p.parameters for p in part_sizes(model) if p.name == "Reasoner: text model")
    text -= c.reasoner.vocab_size * c.reasoner.text.hidden_size  # the input embedding is read by row
    backbone = next(p.parameters for p in part_sizes(model) if p.name == "Backbone")
    decoder = next(p.parameters for p in part_sizes(model) if p.name.startswith("Decoder"))
    table = c.num_codebooks * c.audio_vocab_size * c.backbone.hidden_size
    heads = (c.num_codebooks - 1) * c.decoder.hidden_size * c.audio_vocab_size
    codec = next(p.parameters for p in part_sizes(model) if p.name == "Codec") / 2
    return size * (text / 2 + backbone + (c.num_codebooks - 1) * (decoder - table - heads) + heads + codec)


def counted(program: ClosedJaxpr | Jaxpr, scopes: Sequence[str], within: str = "other") -> dict[str, float]:
    """FLOPs of the products and convolutions of a traced program, by the first of ``scopes`` in the names that it was traced
    under, else ``within``. A loop counts as often as it turns, of branches the longest; zeros that a convolution is spread with
    are not computed with. Raises: InputError for a loop that does not say how often it turns."""
    found: dict[str, float] = collections.defaultdict(float)
    for e in getattr(program, "jaxpr", program).eqns:
        names = str(e.source_info.name_stack)
        scope = next((scope for scope in scopes if re.search(rf"\b{scope}\b", names)), within)
        name, p = e.primitive.name, e.params
        if name == "dot_general":
            (left, _), _ = p["dimension_numbers"]
            found[scope] += 2 * math.prod(shape_of(e.outvars[0])) * math.prod(shape_of(e.invars[0])[i] for i in left)
        elif name == "conv_general_dilated":
            kernel, lanes = shape_of(e.invars[1]), p["dimension_numbers"].rhs_spec[0]
            reads = math.prod(kernel) / kernel[lanes] / math.prod(p["lhs_dilation"])
            found[scope] += 2 * math.prod(shape_of(e.outvars[0])) * reads
        inner = [counted(x, scopes, scope) for x in jax.tree.leaves(p, is_leaf=is_program) if is_program(x)]
        if name == "while" and any(sum(counts.values()) for counts in inner):
            raise InputError("a loop with products in it does not say how often it turns")
        inner = [max(inner, key=lambda counts: sum(counts.values()))] if name == "cond" else inner
        for counts in inner:
            for key, value in counts.items():
                found[key] += value * p.get("length", 1)
    return dict(found)


def shape_of(variable) -> tuple[int, ...]:
    """Shape of a variable of a jaxpr."""
    return variable.aval.shape


def is_program(x) -> bool:
    return isinstance(x, (ClosedJaxpr, Jaxpr))


def describe_codec(config) -> str:
    """A table of a Codec's parts: parameters, bytes in float32, and forward GFLOPs of a second of sound."""
    model = config.model
    codec = nnx.eval_shape(lambda: Codec(nnx.Rngs(0), model))
    discriminator = nnx.eval_shape(lambda: Discriminator(nnx.Rngs(0), config.recipe.discriminator))
    seconds = 8
    samples = -(-seconds * model.sampling_rate // model.samples_per_frame) * model.samples_per_frame
    wave = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    codes = jax.ShapeDtypeStruct((1, model.num_frames(samples), model.num_codebooks), jnp.int32)

    def per_second(module, method, x) -> float:
        graph, state = nnx.split(module)
        program = jax.make_jaxpr(lambda state, x: method(nnx.merge(graph, state), x))(state, x)
        return sum(counted(program, ()).values()) / seconds / 1e9

    parts = {
        "encoder": ((codec.encoder, codec.encoder_transformer, codec.downsample), per_second(codec, Codec.encode, wave)),
        "quantizer, projections": ((codec.quantizer,), None),
        "decoder": ((codec.decoder, codec.decoder_transformer, codec.upsample), per_second(codec, Codec.decode, codes)),
        "discriminator (training only)": (
            (discriminator,),
            per_second(discriminator, lambda discriminator, x: [v.logits for v in discriminator(x)], wave),
        ),
    }
    lines = [f"{'part':<36}{'parameters':>16}{'float32 GB':>12}{'GFLOP per second of sound':>28}"]
    books = codebook_values(model)
    for name, (modules, gflop) in parts.items():
        count = sum(math.prod(x.shape) for x in jax.tree.leaves([nnx.state(m) for m in modules if m is not None]))
        count -= books if name.startswith("quantizer") else 0
        lines.append(
            f"{name:<36}{count:>16,}{4 * count / 1e9:>12.3f}" + (f"{gflop:>28.3f}" if gflop is not None else f"{'–':>28}")
        )
    crop = config.training.global_batch_size * config.data.crop_frames / model.frame_rate
    bits = model.num_codebooks * math.log2(model.codebook_size) * model.frame_rate
    lines += [
        f"The codebooks hold {books:,} values, which are running sums, not parameters; {bits:,.0f} bits per second of sound.",
        f"A step: {config.training.global_batch_size} crops of {config.data.crop_frames} frames, {crop:.1f} s of sound.",
    ]
    return "\n".join(lines)


def describe(config) -> str:
    """A table of a configuration's parts: parameters, bytes in float32 and bf16, forward GFLOPs of one packed row."""
    model, row = config.model, config.data.row
    forward = forward_flops(model, row, config.loss)
    per_part = {"Reasoner: audio encoder": forward.audio_encoder, "Reasoner: text model": forward.text_model}
    per_part |= {"Backbone": forward.backbone, "Decoder (with the audio embedding)": forward.decoder}
    lines = [f"{'part':<36}{'parameters':>16}{'float32 GB':>12}{'bf16 GB':>10}{'GFLOP per row':>15}"]
    sizes = part_sizes(model)
    for part in [*sizes, PartSize("total", sum(p.parameters for p in sizes))]:
        flop = per_part.get(part.name) if part.name != "total" else sum(forward)
        shown = f"{flop / 1e9:15,.2f}" if flop is not None else f"{'–':>15}"
        gigabytes = f"{4 * part.parameters / 1e9:>12.3f}{2 * part.parameters / 1e9:>10.3f}"
        lines.append(f"{part.name:<36}{part.parameters:>16,}{gigabytes}{shown}")
    books = codebook_values(model.codec)
    lines += [
        f"Reasoner in all: {sizes[0].parameters + sizes[1].parameters:,}. The Codec also holds {books:,} codebook values, "
        "which are running sums, not parameters.",
        f"A row: {row.blocks} blocks of speech, {row.text} text, {row.positions} Backbone positions, {row.frames} target frames.",
        f"Weight bytes read per reply frame in bf16: {frame_bytes(model) / 1e9:.3f} GB.",
    ]
    return "\n".join(lines)


def codebook_values(codec: CodecConfig) -> int:
    """embed_sum, cluster_usage and initialized of every codebook."""
    q = codec.quantizer
    return q.num_codebooks * (q.codebook_size * (q.codebook_dim + 1) + 1)
