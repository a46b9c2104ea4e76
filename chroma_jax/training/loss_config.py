"""Configuration of the speaking model's training objective."""

import dataclasses
import math
from typing import Literal

from chroma_jax.utils.errors import InputError

DECODER_WEIGHT = 0.5  # the report's λ


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """decoder_weight: λ. codebook_weights: one non-negative weight w_q per codebook, instead of λ. The speech loss is then
    Σ_q w_q · CE(c_q) / Σ_q w_q. Q equal weights are λ = (Q − 1) / Q. Empty: λ applies.

    prompt_weight: weight of a frame of the voice prompt relative to a frame of the reply. With N reply frames and M prompt frames
    the speech loss is (N · reply mean + prompt_weight · M · prompt mean) / (N + prompt_weight · M). 0: no prompt loss.
    prompt_frames: maximum number of prompt frames with a loss in a packed sequence. When it has more, each step chooses anew.

    speech_weight: of the loss of c0 … c7 (0 leaves Backbone and Decoder uncomputed). text_weight: of the Reasoner's text loss (0
    leaves its logits uncomputed). hearing_weight: of `hearing_loss`, for an audio encoder that is trained from scratch.

    text_chunk: answers of a row whose text logits exist at a time; 0 for all at once. With a vocabulary of 152k, 192 answers of a
    row are 117 MB of logits, and as much again for their gradient.

    reasoner: where its hidden states come from, "computed" in every step, or "stored" beside the data (``prepare
    --cache_reasoner``), which needs a Reasoner that is not trained.

    decoder_chunk: target frames per chunk; each chunk's forward and backward pass run together; 0 for all at once. What it
    makes of them then stays in a processor's caches, and takes no memory for longer. Of several devices, each chunk's gradient is
    summed over them by itself, so it is for one.

    decoder_frames: the share of target frames per row that the Decoder is trained on; below 1, that share of the row's
    capacity is drawn anew at every step, in a fixed number, as CSM does with 1/16. decoder_hidden: whether the Decoder's
    loss reaches the Backbone through h.
    """

    decoder_weight: float = DECODER_WEIGHT
    codebook_weights: tuple[float, ...] = ()
    prompt_weight: float = 0.0
    prompt_frames: int = 256
    speech_weight: float = 1.0
    reasoner: Literal["computed", "stored"] = "computed"
    text_weight: float = 0.0
    text_chunk: int = 0
    hearing_weight: float = 0.0
    decoder_chunk: int = 0
    decoder_frames: float = 1.0
    decoder_hidden: Literal["detached", "attached"] = "detached"

    def __post_init__(self):
        if not 0 < self.decoder_frames <= 1:
            raise ValueError(f"loss.decoder_frames {self.decoder_frames} is not in (0, 1]")
        if not 0 <= self.decoder_weight <= 1:
            raise ValueError(f"loss.decoder_weight {self.decoder_weight} is not in [0, 1]")
        if self.codebook_weights:
            if min(self.codebook_weights) < 0 or not 0 < sum(self.codebook_weights) < math.inf:
                raise ValueError(
                    f"loss.codebook_weights {self.codebook_weights}: expected weights >= 0 with a positive, finite sum"
                )
            if self.decoder_weight != DECODER_WEIGHT:
                raise ValueError(
                    f"loss.codebook_weights and loss.decoder_weight {self.decoder_weight} are both set;"
                    f" leave decoder_weight at {DECODER_WEIGHT} or remove codebook_weights"
                )
        if not 0 <= self.prompt_weight < math.inf:
            raise ValueError(f"loss.prompt_weight is {self.prompt_weight}, expected a finite weight >= 0")
        if self.prompt_frames < 1:
            raise ValueError(f"loss.prompt_frames is {self.prompt_frames}, must be at least 1; loss.prompt_weight 0 turns it off")
        if self.prompt_weight and not self.speech_weight:
            raise ValueError("loss.prompt_weight is set, but loss.speech_weight is 0; set speech_weight, or prompt_weight to 0")
        if self.reasoner == "stored" and (self.text_weight or self.hearing_weight or not self.speech_weight):
            raise ValueError("loss.reasoner 'stored' leaves no loss but that of speech; set text_weight and hearing_weight to 0")
        for name in ("text_chunk", "decoder_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}, must not be negative")

    @property
    def prompt_slots(self) -> int:
        """How many target entries of a packed sequence, the last ones, are for frames of the voice prompt."""
        return self.prompt_frames if self.prompt_weight else 0

    @property
    def residual_weight(self) -> float:
        """The weight λ of the residual codebooks c1 … c(Q−1) together; that of c0 is 1 − λ."""
        w = self.codebook_weights
        return sum(w[1:]) / sum(w) if w else self.decoder_weight

    def check_codebooks(self, codebooks: int) -> None:
        """Raises InputError unless there is one weight for each of the model's codebooks."""
        if self.codebook_weights and len(self.codebook_weights) != codebooks:
            raise InputError(
                f"loss.codebook_weights has {len(self.codebook_weights)} weights, model.codebooks is {codebooks};"
                " give one weight per codebook"
            )
