"""The peer of a training step: the same parts at the same sizes from transformers' Whisper, Qwen2 and Llama classes, in PyTorch's
eager mode with its fused attention and optimizer, on the same rows, on the same device, in the same types."""

from collections.abc import Callable

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, WhisperConfig  # pyright: ignore[reportMissingImports]
from transformers.models.whisper.modeling_whisper import WhisperEncoder  # pyright: ignore[reportMissingImports]

from chroma_jax.config import Config
from chroma_jax.layers.transformer import LlamaConfig as Sizes
from chroma_jax.sequence.batch import Batch
from chroma_jax.utils.errors import InputError


def stack(cls, make, c: Sizes, vocab: int, positions: int):
    """A decoder stack of transformers at our sizes."""
    config = make(
        vocab_size=vocab,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope.theta,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return cls(config)


class TorchTrainer(nn.Module):
    """Everything that a step computes: its losses are those of `chroma_jax.training.loss`."""

    def __init__(self, config: Config):
        super().__init__()
        c, row = config.model, config.data.row
        self.config = config
        audio = c.reasoner.audio
        self.audio = WhisperEncoder(
            WhisperConfig(
                num_mel_bins=audio.mel_bins,
                d_model=audio.hidden_size,
                encoder_layers=audio.num_hidden_layers,
                encoder_attention_heads=audio.num_attention_heads,
                encoder_ffn_dim=audio.intermediate_size,
                max_source_positions=audio.block_frames // 2,
                attn_implementation="sdpa",
            )
        )
        self.project = nn.Linear(audio.hidden_size, audio.output_dim)
        self.text = stack(Qwen2Model, Qwen2Config, c.reasoner.text, c.reasoner.vocab_size, row.text)
        self.words = nn.Linear(c.reasoner.text.hidden_size, c.reasoner.vocab_size, bias=False)
        self.backbone = stack(LlamaModel, LlamaConfig, c.backbone, 1, row.positions)
        self.backbone.embed_tokens = None
        self.first = nn.Linear(c.backbone.hidden_size, c.audio_vocab_size, bias=False)
        self.codes = nn.Embedding(c.num_codebooks * c.audio_vocab_size, c.backbone.hidden_size)
        self.narrow = nn.Linear(c.backbone.hidden_size, c.decoder.hidden_size, bias=False)
        self.decoder = stack(LlamaModel, LlamaConfig, c.decoder, 1, c.num_codebooks)
        self.decoder.embed_tokens = None
        self.heads = nn.Parameter(
            torch.randn(c.num_codebooks - 1, c.decoder.hidden_size, c.audio_vocab_size) * c.decoder.hidden_size**-0.5
        )

    def embedded(self, codes: torch.Tensor) -> torch.Tensor:
        """[…, Q'] codes of the first Q' codebooks → […, Q', D]."""
        return self.codes(codes + self.config.model.audio_vocab_size * torch.arange(codes.shape[-1], device=codes.device))

    def forward(self, b: dict[str, torch.Tensor]) -> torch.Tensor:
        config, c = self.config, self.config.model
        row = torch.arange(len(b["mel"]), device=b["mel"].device)[:, None]
        heard = self.audio(b["mel"].flatten(0, 1).transpose(1, 2)).last_hidden_state
        heard = self.project(heard.unflatten(1, (-1, 2)).mean(2)).reshape(len(row), -1, c.reasoner.text.hidden_size)
        spoken = b["audio_index"] >= 0
        taken = heard.gather(1, b["audio_index"].clamp(min=0)[..., None].expand(-1, -1, heard.shape[-1]))
        x = torch.where(spoken[..., None], taken, self.text.embed_tokens(b["text"]))
        x = self.text(inputs_embeds=x).last_hidden_state
        answers = x[row, b["answer_position"]]
        total = x.new_zeros(())
        if config.loss.text_weight:
            logits = self.words(answers)
            total = total + config.loss.text_weight * F.cross_entropy(logits.flatten(0, 1), b["answer_token"].flatten())
        token, hidden_index, codes = b["token"], b["hidden_index"], b["codes"]
        x = torch.where((token >= 0)[..., None], self.text.embed_tokens(token.clamp(min=0)), 0.0)
        picked = answers[row, hidden_index.clamp(min=0)]
        x = x + torch.where((hidden_index >= 0)[..., None], picked, 0.0)
        frames = self.embedded(codes.clamp(min=0)).sum(-2)
        x = x + torch.where((codes[..., :1] >= 0), frames, 0.0)
        x = self.backbone(inputs_embeds=x).last_hidden_state
        hidden = x[row, b["target_position"].clamp(min=0)].flatten(0, 1)
        target = b["target_codes"].flatten(0, 1)
        c0 = F.cross_entropy(self.first(hidden), target[:, 0], ignore_index=-1)
        hidden, part = hidden.detach(), target
        if config.loss.decoder_frame_fraction < 1:
            chosen = torch.randperm(len(hidden), device=hidden.device)[
                : int(np.ceil(len(hidden) * config.loss.decoder_frame_fraction))
            ]
            hidden, part = hidden[chosen], target[chosen]
        x = self.narrow(torch.cat([hidden[:, None], self.embedded(part[:, :-1].clamp(min=0))], 1))
        x = self.decoder(inputs_embeds=x).last_hidden_state[:, 1:]
        logits = torch.einsum("NQD,QDV->NQV", x, self.heads)
        residual = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), ignore_index=-1)
        weight = config.loss.decoder_weight
        return total + (1 - weight) * c0 + weight * residual


class TorchStep:
    """Forward, backward, clipping and AdamW. Trained weights and their moments are float32; products are in the type computed in,
    by autocast, and frozen parts in theirs."""

    def __init__(self, config: Config, batch: Batch, threads: int, device: str):
        """device: PyTorch's name of it, "cpu" or "cuda"."""
        if config.loss.codebook_weights or config.loss.prompt_weight:
            raise InputError(
                "the peer 'torch' has no codebook_weights and no prompt_weight: unset them in loss, or give --peer none"
            )
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.device, self.dtype = device, getattr(torch, config.precision.compute)
        with torch.device(device):
            self.model = TorchTrainer(config).train()
        o = config.optimizer
        for part in (self.model.audio, self.model.text, self.model.words, self.model.project):
            if any(pattern.startswith("reasoner") for pattern in o.freeze):
                part.requires_grad_(False).to(getattr(torch, config.precision.frozen))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        options = {"lr": o.learning_rate, "betas": (o.b1, o.b2), "eps": o.eps, "weight_decay": o.weight_decay}
        self.optimizer = torch.optim.AdamW(self.trained, fused=True, **options)
        self.clip = o.grad_clip_norm
        arrays = {name: np.array(x) for name, x in batch._asdict().items() if name not in ("hidden", "ctc_target")}
        arrays = {name: x if x.dtype == np.float32 else x.astype(np.int64) for name, x in arrays.items()}
        self.batch = {name: torch.from_numpy(x).to(device) for name, x in arrays.items()}

    @property
    def parameters(self) -> int:
        """But for Whisper's table of sinusoids, which are no weights here."""
        return sum(p.numel() for name, p in self.model.named_parameters() if "embed_positions" not in name)

    def __call__(self) -> float:
        """Takes a step; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        return loss.item()

    def product(self, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
        a, b = (torch.from_numpy(factor).to(self.device, self.dtype) for factor in (x, y))

        def multiply():
            torch.matmul(a, b)
            if self.device != "cpu":
                torch.cuda.synchronize()

        return multiply
