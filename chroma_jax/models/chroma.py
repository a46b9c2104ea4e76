"""Chroma: the four parts and how a packed row flows through them. The axis ``answers`` counts the reply tokens of a row."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import LlamaConfig
from chroma_jax.models.backbone import AudioEmbedding, Backbone
from chroma_jax.models.codec import CodecConfig
from chroma_jax.models.decoder import Decoder
from chroma_jax.models.reasoner import Reasoner, ReasonerConfig
from chroma_jax.parallel.sharding import RULES, AxisRules, constrain, take_rows
from chroma_jax.sequence.batch import Batch, is_present
from chroma_jax.sequence.chat_template import SpecialTokens
from chroma_jax.utils.fields import INT_MAX, Checked, NonNegativeInt, PositiveInt, Range


@dataclasses.dataclass(frozen=True)
class ChromaConfig(Checked):
    """The whole model. The defaults are the released 4B model's sizes.

    Attributes:
        reasoner: Audio encoder and language model.
        backbone: Llama stack over text and audio interleaved 1:2.
        decoder: Llama stack over the codebooks of a frame.
        codec: Sizes of the Codec.
        tokens: Ids of the special tokens.
        num_codebooks: Codebooks of each frame that the model predicts; the Codec may have more.
        audio_vocab_size: Entries per codebook, special ones included.
        codebook_pad_token_id: Code of a finished row in the reference implementation's output.
        codebook_eos_token_id: A frame of this code ends a reply; -1 for none.

    Example:
        >>> chroma_jax.ChromaConfig().codec.frame_rate
        12.5
    """

    reasoner: ReasonerConfig = ReasonerConfig()
    backbone: LlamaConfig = LlamaConfig(
        num_hidden_layers=16,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        rope=RopeConfig(theta=5e5),
    )
    decoder: LlamaConfig = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        intermediate_size=8192,
        rope=RopeConfig(theta=5e5),
    )
    codec: CodecConfig = CodecConfig()
    tokens: SpecialTokens = SpecialTokens()
    num_codebooks: PositiveInt = 8
    audio_vocab_size: PositiveInt = 2051
    codebook_pad_token_id: NonNegativeInt = 2050
    codebook_eos_token_id: Annotated[int, Range(-1, INT_MAX)] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.backbone.hidden_size != self.reasoner.text.hidden_size:
            raise ValueError(
                f"backbone.hidden_size {self.backbone.hidden_size} differs from "
                f"reasoner.text.hidden_size {self.reasoner.text.hidden_size}: "
                "the Reasoner's vectors enter the Backbone unprojected"
            )
        if self.audio_vocab_size < self.codec.codebook_size:
            raise ValueError(
                f"audio_vocab_size {self.audio_vocab_size} is smaller than codec.codebook_size {self.codec.codebook_size}"
            )
        if self.num_codebooks > self.codec.num_codebooks:
            raise ValueError(f"num_codebooks {self.num_codebooks} exceeds codec.num_codebooks {self.codec.num_codebooks}")
        largest = max(dataclasses.asdict(self.tokens).values())
        if largest >= self.reasoner.vocab_size:
            raise ValueError(f"special token {largest} is outside reasoner.vocab_size {self.reasoner.vocab_size}")

    def rules_of(self, path: str) -> AxisRules:
        """Where the axes of a weight lie, by the part that it belongs to. path: "decoder/model/blocks/gate/kernel". The audio
        embedding, which two parts share, follows the rules that hold by default."""
        parts = {
            "reasoner/audio/": self.reasoner.audio.rules,
            "reasoner/": self.reasoner.text.rules,
            "backbone/": self.backbone.rules,
            "decoder/": self.decoder.rules,
        }
        return next((rules for part, rules in parts.items() if path.startswith(part)), RULES)


class Chroma(nnx.Module):
    """Reasoner, Backbone and Decoder, and the audio embedding that the last two share.

    The Codec is apart: it encodes recordings before training, and decodes the codes that the model predicts.

    Example:
        >>> config = chroma_jax.read_config("nano").model
        >>> shapes = nnx.eval_shape(lambda: chroma_jax.Chroma(nnx.Rngs(0), config))
        >>> shapes.config.num_codebooks
        8
    """

    def __init__(self, rngs: nnx.Rngs, config: ChromaConfig):
        c = config
        self.config = c
        self.reasoner = Reasoner(rngs, c.reasoner)
        self.backbone = Backbone(rngs, c.backbone, c.audio_vocab_size)
        self.audio_embedding = AudioEmbedding(rngs, c.num_codebooks, c.audio_vocab_size, c.backbone.hidden_size)
        self.decoder = Decoder(
            rngs, c.decoder, input_width=c.backbone.hidden_size, codebooks=c.num_codebooks, audio_vocab_size=c.audio_vocab_size
        )

    def answers(self, batch: Batch, audio: Float[jax.Array, "B A D"]) -> Float[jax.Array, "B answers D"]:
        """The Reasoner's hidden states that predict the reply tokens of packed rows, from the audio encoder's outputs."""
        hidden = self.reasoner.read(audio, batch.text, batch.text_position, batch.text_segment, batch.audio_index)
        return take_rows(hidden, jnp.maximum(batch.answer_position, 0))

    def interleaved(self, batch: Batch, answers: Float[jax.Array, "B answers D"]) -> Float[jax.Array, "B T D"]:
        """The Backbone's input sequence of packed rows, from the result of `answers`."""
        dtype = answers.dtype
        token = constrain(jnp.asarray(batch.token), "batch", "sequence", rules=self.config.backbone.rules)
        text = self.reasoner.embedding(jnp.maximum(token, 0), dtype)
        hidden_index = constrain(jnp.asarray(batch.hidden_index), "batch", "sequence", rules=self.config.backbone.rules)
        hidden = take_rows(answers, jnp.maximum(hidden_index, 0))
        codes = constrain(jnp.asarray(batch.codes), "batch", "sequence", None, rules=self.config.backbone.rules)
        x = jnp.where(is_present(token)[..., None], text, 0)
        x = x + jnp.where(is_present(hidden_index)[..., None], hidden, 0)
        return x + self.audio_embedding.frames(codes, dtype)

    def frame_logits(self, hidden: Float[jax.Array, "F D"], codes: Int[jax.Array, "F Q"]) -> Float[jax.Array, "F Q-1 V"]:
        """Teacher-forced logits of the residual codebooks.

        Args:
            hidden: The Backbone's h at the position that predicts each frame.
            codes: Codes of that frame.
        """
        return frame_logits(self.decoder, self.audio_embedding, hidden, codes)


def frame_logits(
    decoder: Decoder, embedding: AudioEmbedding, hidden: Float[jax.Array, "F D"], codes: Int[jax.Array, "F Q"]
) -> Float[jax.Array, "F Q-1 V"]:
    """`Chroma.frame_logits` of the two parts that compute them."""
    levels = jnp.arange(decoder.codebooks - 1)
    return decoder(hidden, embedding(codes[:, :-1], levels, hidden.dtype))
