"""The peer of a streamed reply: the reference's architecture from transformers' own classes (Qwen2.5-Omni's audio encoder and
text model, Llama, CSM's depth decoder, Mimi) at our sizes with random weights, in PyTorch's eager mode with its fused attention.

The loop is the reference's, greedy, with a cache of keys and values for each stack, without what costs time and is not needed: no
wrappers around the classes, no logits but those that a choice is made from, one call for what the Backbone is fed at a time.
"""

import dataclasses
import inspect
import time
from collections.abc import Iterator

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from transformers import DynamicCache, LlamaConfig, LlamaModel, MimiConfig, MimiModel  # pyright: ignore[reportMissingImports]
from transformers.models.csm.configuration_csm import CsmDepthDecoderConfig  # pyright: ignore[reportMissingImports]
from transformers.models.csm.modeling_csm import CsmDepthDecoderModel  # pyright: ignore[reportMissingImports]
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig, Qwen2_5OmniTextConfig  # pyright: ignore[reportMissingImports]
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder, Qwen2_5OmniThinkerTextModel  # pyright: ignore[reportMissingImports]

from chroma_jax.audio.log_mel import FeatureConfig, log_mel
from chroma_jax.models.chroma import ChromaConfig
from chroma_jax.models.io.hf_config import to_hf
from chroma_jax.sequence.interleave import opens_pair


def named(function, *names: str) -> str:
    """The first of the names that a function takes: releases of transformers differ."""
    return next(name for name in names if name in inspect.signature(function).parameters)


CACHE = named(LlamaModel.forward, "cache", "past_key_values")
CODEC_CACHE = named(MimiModel.decode, "decoder_cache", "decoder_past_key_values")


@dataclasses.dataclass(frozen=True)
class TorchReply:
    """When what was there, in seconds since the question was. voice: its codes; prefill: both prompts in their caches; codes: the
    first frame's; last_codes: those of all ``frames``; arrivals: (when, samples [S]) of each piece of sound on the host."""

    voice: float
    prefill: float
    codes: float
    last_codes: float
    frames: int
    arrivals: list[tuple[float, np.ndarray]]


class TorchPeer(nn.Module):
    """The reference's parts, to answer one question at a time."""

    def __init__(self, config: ChromaConfig, dtype: str, threads: int, device: str):
        """dtype: of all but the Codec, which is in float32. device: PyTorch's name of it, "cpu" or "cuda"."""
        super().__init__()
        torch.set_num_threads(threads)
        said, attention = to_hf(config), {"attn_implementation": "sdpa"}
        thinker, backbone, decoder = said["thinker_config"], said["backbone_config"], said["decoder_config"]
        self.config, self.device = config, device
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with torch.device(self.device):
                self.audio = Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(**thinker["audio_config"], **attention))
                self.text = Qwen2_5OmniThinkerTextModel(Qwen2_5OmniTextConfig(**thinker["text_config"], **attention))
                self.words = nn.Linear(config.reasoner.text.hidden_size, config.reasoner.vocab_size, bias=False)
                nothing = {"bos_token_id": None, "eos_token_id": None}
                backbone = backbone | nothing | {"model_type": "llama", "vocab_size": 1, "max_position_embeddings": 8192}
                self.backbone = LlamaModel(LlamaConfig(**backbone, **attention))
                self.backbone.embed_tokens = None
                self.first = nn.Linear(config.backbone.hidden_size, config.audio_vocab_size, bias=False)
                decoder = decoder | {"model_type": "csm_depth_decoder_model", "num_codebooks": config.num_codebooks}
                decoder |= {"backbone_hidden_size": config.backbone.hidden_size}
                self.decoder = CsmDepthDecoderModel(CsmDepthDecoderConfig(**decoder, **attention))
                # kept as a product takes them at once, not as CSM has them, in one array that it picks from by copying
                heads = (
                    nn.Linear(config.decoder.hidden_size, config.audio_vocab_size, bias=False)
                    for _ in range(config.num_codebooks - 1)
                )
                self.heads = nn.ModuleList(heads)
                torch.set_default_dtype(torch.float32)
                self.codec = MimiModel(MimiConfig(**said["codec_config"] | {"model_type": "mimi"}, **attention))
        finally:
            torch.set_default_dtype(before)
        for name, buffer in self.codec.named_buffers():  # the class begins with codebooks of zeros
            if name.endswith("embed_sum"):
                nn.init.normal_(buffer)
        self.eval().requires_grad_(False)
        self.offsets = config.audio_vocab_size * torch.arange(config.num_codebooks, device=self.device)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @torch.inference_mode()
    def encode(self, voice: np.ndarray) -> torch.Tensor:
        """voice: float32 [S] at the Codec's rate. Returns codes [F, Q]."""
        samples = torch.from_numpy(voice).to(self.device)[None, None]
        return self.codec.encode(samples, num_quantizers=self.config.num_codebooks).audio_codes[0].T

    @torch.inference_mode()
    def reply(
        self,
        question: np.ndarray,
        text: np.ndarray,
        voice_text: np.ndarray,
        voice: np.ndarray | torch.Tensor,
        *,
        frames: int,
        codec_every: int,
    ) -> TorchReply:
        """question: float32 [S] at 16 kHz. text: tokens [L] with a place for every output of the audio encoder. voice_text:
        tokens [L']; voice: samples, or the codes of them. codec_every: so many frames are decoded at a time; what the class keeps
        from one piece to the next is its attention's cache, while the convolutions begin anew, and one can hear where."""
        started = time.perf_counter()

        def now() -> float:
            if self.device != "cpu":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        codes = self.encode(voice) if isinstance(voice, np.ndarray) else voice
        voiced = now()
        heard, thinker = self._listen(question, self._tensor(text))
        backbone = self._take_voice(self._tensor(voice_text), codes)
        prefilled = now()
        first, arrivals, waiting = 0.0, [], []
        decoded = DynamicCache(config=self.codec.config) if codec_every < frames else None
        for i, frame in enumerate(self._codes(heard, thinker, backbone, frames)):
            first = first or now()
            waiting.append(frame)
            if len(waiting) == codec_every and i + 1 < frames:
                samples, waiting = self._sound(waiting, decoded), []
                arrivals.append((now(), samples))
        last = now()
        samples = self._sound(waiting, decoded)
        return TorchReply(voiced, prefilled, first, last, frames, [*arrivals, (now(), samples)])

    def _tensor(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)

    def _listen(self, question: np.ndarray, text: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
        """Returns the hidden state that predicts the first token, [1, D], and the text model's cache."""
        mel = log_mel(question, FeatureConfig(mel_bins=self.config.reasoner.audio.mel_bins))
        features = torch.from_numpy(np.ascontiguousarray(mel.T)).to(self.device)
        length = torch.tensor([len(mel)], device=self.device)
        heard = self.audio(features, feature_lens=length, aftercnn_lens=(length - 1) // 2 + 1).last_hidden_state
        x, cache = self.text.embed_tokens(text), DynamicCache()
        x[text == self.config.tokens.audio] = heard.to(x.dtype)
        return self.text(inputs_embeds=x[None], **{CACHE: cache}, use_cache=True).last_hidden_state[:, -1], cache

    def _take_voice(self, text: torch.Tensor, codes: torch.Tensor) -> DynamicCache:
        """The Backbone's cache after the voice prompt. codes: [F, Q]."""
        words, cache = self.text.embed_tokens(text), DynamicCache()
        x = torch.cat([words, self._embedded(codes), torch.zeros_like(words[:1])])
        self.backbone(inputs_embeds=x[None], **{CACHE: cache}, use_cache=True)
        return cache

    def _embedded(self, codes: torch.Tensor) -> torch.Tensor:
        """[F, Q] → [F, D]."""
        return self.decoder.embed_tokens(codes + self.offsets).sum(-2)

    def _codes(self, heard: torch.Tensor, thinker: DynamicCache, backbone: DynamicCache, frames: int) -> Iterator[torch.Tensor]:
        """Yields codes [1, Q] of each frame. heard: [1, D]."""
        token = frame = None
        for i in range(frames):
            fed = [] if frame is None else [self._embedded(frame)]
            if opens_pair(i):
                if token is not None:
                    heard = self.text(inputs_embeds=token[None], **{CACHE: thinker}, use_cache=True).last_hidden_state[:, -1]
                token = self.text.embed_tokens(self.words(heard).argmax(-1))
                fed += [heard, token]
            x = self.backbone(inputs_embeds=torch.cat(fed)[None], **{CACHE: backbone}, use_cache=True).last_hidden_state[:, -1]
            frame = self._frame(x)
            yield frame

    def _frame(self, hidden: torch.Tensor) -> torch.Tensor:
        """The Backbone's h, [1, D] → codes [1, Q]."""
        spoken, cache, embed = self.config.codec.codebook_size, DynamicCache(), self.decoder.embed_tokens
        code = self.first(hidden)[:, :spoken].argmax(-1)
        codes, x = [code], torch.stack([hidden, embed(code)], 1)
        for level, head in enumerate(self.heads, 1):
            x = self.decoder(inputs_embeds=x, **{CACHE: cache}, use_cache=True).last_hidden_state[:, -1]
            code = head(x)[:, :spoken].argmax(-1)
            codes.append(code)
            x = embed(code + level * self.config.audio_vocab_size)[:, None]
        return torch.stack(codes, -1)

    def _sound(self, frames: list[torch.Tensor], cache: DynamicCache | None) -> np.ndarray:
        """Frames of codes [1, Q] → float32 [S] on the host."""
        codes = torch.stack(frames, -1)
        kept = {} if cache is None else {CODEC_CACHE: cache}
        return self.codec.decode(codes, **kept).audio_values[0, 0].cpu().numpy()
