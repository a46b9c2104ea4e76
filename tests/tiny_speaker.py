"""The smallest model that speaks, with random weights, conversations for it, and what training's forward pass says of them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from chroma_jax.audio.load import from_int16
from chroma_jax.audio.log_mel import FeatureConfig
from chroma_jax.inference.generator import Generation, Generator
from chroma_jax.inference.prefill import Prompt
from chroma_jax.inference.prompt import make_prompt
from chroma_jax.inference.sampling import SamplingParams
from chroma_jax.layers.rope import RopeConfig
from chroma_jax.layers.transformer import EncoderConfig, LlamaConfig
from chroma_jax.models.audio_encoder import AudioEncoderConfig
from chroma_jax.models.chroma import Chroma, ChromaConfig
from chroma_jax.models.codec import Codec, CodecConfig, QuantizerConfig, SeanetConfig
from chroma_jax.models.reasoner import ReasonerConfig
from chroma_jax.sequence.batch import Batch, PackedShape
from chroma_jax.sequence.chat_template import SpecialTokens
from chroma_jax.serving.engine import EngineConfig
from data_pipelines.pack import conversation, pack_config, place
from data_pipelines.records import to_example

VOCABULARY, CODES, AUDIO_VOCAB, LEVELS = 320, 32, 35, 4
FEATURES = FeatureConfig(mel_bins=16)


def tiny() -> ChromaConfig:
    llama = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48
    )
    audio = AudioEncoderConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        mel_bins=16,
        block_frames=40,
        output_dim=32,
    )
    transformer = EncoderConfig(
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        layer_scale=0.5,
        rope=RopeConfig(1e4),
    )
    return ChromaConfig(
        reasoner=ReasonerConfig(audio=audio, text=dataclasses.replace(llama, qkv_bias=True), vocab_size=VOCABULARY),
        backbone=llama,
        decoder=dataclasses.replace(llama, num_hidden_layers=1, hidden_size=16, head_dim=4, intermediate_size=24),
        codec=CodecConfig(
            seanet=SeanetConfig(num_filters=4, ratios=(4, 2)),
            transformer=transformer,
            quantizer=QuantizerConfig(num_codebooks=LEVELS, codebook_size=CODES, codebook_dim=8),
            upsample_groups=16,
            sliding_window=6,
        ),
        tokens=SpecialTokens(*range(VOCABULARY - 8, VOCABULARY)),
        num_codebooks=LEVELS,
        audio_vocab_size=AUDIO_VOCAB,
        codebook_pad_token_id=AUDIO_VOCAB - 1,
    )


CONFIG = tiny()
RATE = CONFIG.codec.sampling_rate
MAX_FRAMES = 16  # of a reply; one size for all tests, so that they share their compiled programs
SIZES = EngineConfig(
    slots=4,
    text_positions=160,
    voice_positions=48,
    max_seconds=MAX_FRAMES / CONFIG.codec.frame_rate,
    chunk=16,
    frames_per_call=2,  # a step of more frames is a program more
)


def encode(text: str) -> list[int]:
    """Any token can be written: chr(1000 + id)."""
    return [ord(c) - 1000 if ord(c) >= 1000 else ord(c) for c in text]


def written(tokens: list[int]) -> str:
    return "".join(chr(1000 + t) for t in tokens)


@dataclasses.dataclass(frozen=True)
class Case:
    """question: int16 [S] at 16 kHz."""

    question: np.ndarray
    codes: np.ndarray
    transcript: str

    @property
    def prompt(self) -> Prompt:
        heard = from_int16(self.question)
        return make_prompt(CONFIG, encode, question=heard, reference_codes=self.codes, transcript=self.transcript)

    def packed(self, tokens: list[int], codes: np.ndarray) -> Batch:
        """The training row of this conversation with a given reply, as the data pipeline makes it."""
        packing = pack_config(CONFIG, FEATURES)
        found = conversation(
            "case",
            wave=self.question,
            answer_text=written([t for t in tokens if t != CONFIG.tokens.im_end]),
            transcript=self.transcript,
            reference_codes=self.codes,
            answer_codes=codes,
            encode=encode,
            config=packing,
        )
        row = place([found], PackedShape(blocks=8, text=128, answers=16, positions=128, frames=16), packing)
        return jax.tree.map(lambda x: x[None], to_example(row, FEATURES, CONFIG.reasoner.audio.block_frames))


def case(seed: int, samples: int, frames: int, transcript: str) -> Case:
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, CODES, (frames, LEVELS))
    return Case(rng.integers(-3000, 3000, samples).astype(np.int16), codes, transcript)


def generator_for(model: Chroma, codec: Codec, *, slots: int = 1, frames: int = 12, **options) -> Generator:
    """One that all conversations here fit into, so that few programs are compiled. frames: of a reply, at most MAX_FRAMES."""
    generator = Generator(model, codec, text_positions=128, voice_positions=128, max_frames=MAX_FRAMES, slots=slots, **options)
    generator.max_frames = frames
    return generator


def replies(generator: Generator, cases: Sequence[Case], sampling: Sequence[SamplingParams] | None = None) -> list[Generation]:
    """Of each conversation; greedy by default."""
    return list(generator.replies(zip([c.prompt for c in cases], sampling or [SamplingParams()] * len(cases), strict=True)))


def tokens_of(reply: Generation) -> list[int]:
    return [token for _, token in reply.tokens]


@jax.jit
def rescored(model: Chroma, batch: Batch):
    """The packed forward pass of training: logits of the reply's tokens, of c0 and of the other levels at each frame."""
    answers = model.answers(batch, model.reasoner.audio(batch.mel, batch.mel_length))
    hidden = model.backbone(model.interleaved(batch, answers), batch.position, batch.segment)
    hidden = hidden[0, jnp.maximum(batch.target_position[0], 0)]
    residual = model.frame_logits(hidden, batch.target_codes[0])
    return model.reasoner.logits(answers[0]), jnp.concatenate([model.backbone.logits(hidden)[:, None], residual], axis=1)
