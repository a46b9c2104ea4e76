"""Chroma: the four parts and how a packed row flows through them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import LlamaConfig
from chroma_jax.models.backbone import AudioEmbedding, Backbone
from chroma_jax.models.codec import CodecConfig
from chroma_jax.models.decoder import Decoder
from chroma_jax.models.reasoner import Reasoner, ReasonerConfig
from chroma_jax.parallel.sharding import RULES, AxisRules, constrain, take_rows
from chroma_jax.sequence.batch import Batch, is_present
from chroma_jax.sequence.chat_template import SpecialTokens


@dataclasses.dataclass(frozen=True)
class ChromaConfig:
    """The whole model. The defaults are the released 4B model's sizes.

    codebooks: of each frame that the model speaks (the Codec may have more). audio_vocab: entries per codebook with the
    special ones. codebook_pad: the code of a finished row in the reference's output; a frame of ``codebook_eos`` ends a reply.
    """

    reasoner: ReasonerConfig = ReasonerConfig()
    backbone: LlamaConfig = LlamaConfig(
        num_layers=16, width=2048, num_heads=32, num_kv_heads=8, head_dim=64, mlp_width=8192, rope=RopeConfig(theta=5e5)
    )
    decoder: LlamaConfig = LlamaConfig(
        num_layers=4, width=1024, num_heads=8, num_kv_heads=2, head_dim=128, mlp_width=8192, rope=RopeConfig(theta=5e5)
    )
    codec: CodecConfig = CodecConfig()
    tokens: SpecialTokens = SpecialTokens()
    codebooks: int = 8
    audio_vocab: int = 2051
    codebook_pad: int = 2050
    codebook_eos: int = 0

    def __post_init__(self):
        if self.backbone.width != self.reasoner.text.width:
            raise ValueError(
                f"backbone.width {self.backbone.width} differs from reasoner.text.width {self.reasoner.text.width}:"
                " the Reasoner's vectors enter the Backbone unprojected"
            )
        if self.audio_vocab < self.codec.codebook_size:
            raise ValueError(f"audio_vocab {self.audio_vocab} is smaller than codec.codebook_size {self.codec.codebook_size}")
        if self.codebooks > self.codec.num_codebooks:
            raise ValueError(f"codebooks {self.codebooks} exceeds codec.num_codebooks {self.codec.num_codebooks}")
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
    """Reasoner, Backbone, Decoder and the audio embedding that the last two share. The Codec stands apart: it turns
    recordings into codes before training and codes into samples after the model has spoken."""

    def __init__(self, rngs: nnx.Rngs, config: ChromaConfig):
        c = config
        self.config = c
        self.reasoner = Reasoner(rngs, c.reasoner)
        self.backbone = Backbone(rngs, c.backbone, c.audio_vocab)
        self.audio_embedding = AudioEmbedding(rngs, c.codebooks, c.audio_vocab, c.backbone.width)
        self.decoder = Decoder(rngs, c.decoder, input_width=c.backbone.width, codebooks=c.codebooks, audio_vocab=c.audio_vocab)

    def answers(self, batch: Batch, audio: jax.Array) -> jax.Array:
        """The Reasoner's hidden states that predict the reply tokens of packed rows: [B, answers, D]. audio: [B, A, D], what the
        audio encoder makes of the rows' speech."""
        hidden = self.reasoner.read(audio, batch.text, batch.text_position, batch.text_segment, batch.audio_index)
        return take_rows(hidden, jnp.maximum(batch.answer_position, 0))

    def interleaved(self, batch: Batch, answers: jax.Array) -> jax.Array:
        """The Backbone's input sequence of packed rows: [B, T, D]. answers: [B, answers, D] from `answers`."""
        dtype = answers.dtype
        token = constrain(batch.token, "batch", "sequence", rules=self.config.backbone.rules)
        text = self.reasoner.embedding(jnp.maximum(token, 0), dtype)
        hidden_index = constrain(batch.hidden_index, "batch", "sequence", rules=self.config.backbone.rules)
        hidden = take_rows(answers, jnp.maximum(hidden_index, 0))
        codes = constrain(batch.codes, "batch", "sequence", None, rules=self.config.backbone.rules)
        x = jnp.where(is_present(token)[..., None], text, 0)
        x = x + jnp.where(is_present(hidden_index)[..., None], hidden, 0)
        return x + self.audio_embedding.frames(codes, dtype)

    def frame_logits(self, hidden: jax.Array, codes: jax.Array) -> jax.Array:
        """Teacher-forced logits of the residual codebooks.

        hidden: [N, D], the Backbone's h at the position that predicts each frame; codes: int32 [N, Q] of that frame.
        Returns [N, Q−1, audio_vocab].
        """
        return frame_logits(self.decoder, self.audio_embedding, hidden, codes)


def frame_logits(decoder: Decoder, embedding: AudioEmbedding, hidden: jax.Array, codes: jax.Array) -> jax.Array:
    """`Chroma.frame_logits` of the two parts that compute them."""
    levels = jnp.arange(decoder.codebooks - 1)
    return decoder(hidden, embedding(codes[:, :-1], levels, hidden.dtype))
