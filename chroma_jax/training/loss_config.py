"""Configuration of the speaking model's training objective."""

import dataclasses
import math
from typing import Literal

from chroma_jax.utils.errors import InputError
from chroma_jax.utils.fields import Checked, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFraction, PositiveInt

DECODER_WEIGHT = 0.5  # the report's λ


@dataclasses.dataclass(frozen=True)
class LossConfig(Checked):
    """Weights of the losses of a speaking model, and how they are computed.

    Attributes:
        decoder_weight: λ: share of codebooks 1 to Q − 1 in the speech loss, (1 − λ) · CE(c0) + λ · mean CE(c1 …).
        codebook_weights: One weight w_q per codebook instead of λ: the speech loss is Σ_q w_q · CE(c_q) / Σ_q w_q. Empty: λ
            applies.
        prompt_weight: Weight of a voice prompt's frame relative to a reply's frame; 0 for no loss on the prompt.
        prompt_frames: Maximum number of prompt frames with a loss per packed sequence; longer prompts are sampled anew at each
            step.
        speech_weight: Weight of the speech loss; 0 leaves Backbone and Decoder uncomputed.
        reasoner: Whether the Reasoner's hidden states are "computed" in every step, or "stored" next to the data by prepare
            --cache_reasoner, for a Reasoner that is not trained.
        text_weight: Weight of the Reasoner's text loss; 0 leaves its logits uncomputed.
        logits_chunk_size: Reply tokens of a packed sequence whose text logits exist at a time; 0 for all at once.
        ctc_weight: Weight of the CTC loss on the audio encoder's outputs, for an encoder that is trained from scratch.
        decoder_chunk_size: Target frames per chunk of the Decoder; each chunk's forward and backward pass run together, on one
            device; 0 for all at once.
        decoder_frame_fraction: Fraction of the target frames that the Decoder is trained on, sampled anew at each step.
        stop_gradient_hidden: Whether the Decoder's loss stops at the Backbone's hidden state.
    """

    decoder_weight: Fraction = DECODER_WEIGHT
    codebook_weights: tuple[NonNegativeFloat, ...] = ()
    prompt_weight: NonNegativeFloat = 0.0
    prompt_frames: PositiveInt = 256
    speech_weight: NonNegativeFloat = 1.0
    reasoner: Literal["computed", "stored"] = "computed"
    text_weight: NonNegativeFloat = 0.0
    logits_chunk_size: NonNegativeInt = 0
    ctc_weight: NonNegativeFloat = 0.0
    decoder_chunk_size: NonNegativeInt = 0
    decoder_frame_fraction: PositiveFraction = 1.0
    stop_gradient_hidden: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.codebook_weights and not 0 < sum(self.codebook_weights) < math.inf:
            raise ValueError(f"codebook_weights is {self.codebook_weights}, expected weights with a positive, finite sum")
        if self.codebook_weights and self.decoder_weight != DECODER_WEIGHT:
            raise ValueError(
                f"codebook_weights and decoder_weight {self.decoder_weight} are both set;"
                f" leave decoder_weight at {DECODER_WEIGHT} or remove codebook_weights"
            )
        if self.prompt_weight and not self.speech_weight:
            raise ValueError("prompt_weight is set, but speech_weight is 0; set speech_weight, or prompt_weight to 0")
        if self.reasoner == "stored" and (self.text_weight or self.ctc_weight or not self.speech_weight):
            raise ValueError("reasoner 'stored' leaves no loss but that of speech; set text_weight and ctc_weight to 0")

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
                f"loss.codebook_weights has {len(self.codebook_weights)} weights, model.num_codebooks is {codebooks};"
                " give one weight per codebook"
            )
