"""How a spoken turn is written down for the Reasoner (ChatML, as Qwen2.5-Omni was trained)."""

import dataclasses
from collections.abc import Callable, Sequence

from chroma_jax.utils.fields import Checked, NonNegativeInt

Encode = Callable[[str], list[int]]  # text → token ids, without special tokens


@dataclasses.dataclass(frozen=True)
class SpecialTokens(Checked):
    """Ids of tokens with a meaning of their own; the defaults are Qwen2.5's and Chroma's.

    Attributes:
        pad: Padding.
        im_start: Begins a turn.
        im_end: Ends a turn.
        audio: Placeholder of an audio encoder output.
        audio_start: Begins the user's speech.
        audio_end: Ends the user's speech.
        text_start: Begins a transcript.
        text_end: Ends a transcript.
    """

    pad: NonNegativeInt = 151_643
    im_start: NonNegativeInt = 151_644
    im_end: NonNegativeInt = 151_645
    audio: NonNegativeInt = 151_646
    audio_start: NonNegativeInt = 151_647
    audio_end: NonNegativeInt = 151_648
    text_start: NonNegativeInt = 151_665
    text_end: NonNegativeInt = 151_666


def question(encode: Encode, tokens: SpecialTokens, *, heard: Sequence[int] = (), said: str = "", system: str = "") -> list[int]:
    """Token ids of a conversation up to where the reply begins.

    heard: what stands in the place of the user's recording, a placeholder ``tokens.audio`` for each of the encoder's outputs.
    said: what the user writes, after the recording or (nothing heard) instead of one.
    """
    turns = [*system_turn(encode, tokens, system), *user_opening(encode, tokens)]
    if heard:
        turns += [tokens.audio_start, *heard, tokens.audio_end]
    return [*turns, *user_closing(encode, tokens, said)]


def system_turn(encode: Encode, tokens: SpecialTokens, text: str) -> list[int]:
    """What stands before a conversation; nothing for an empty text."""
    return [tokens.im_start, *encode("system\n" + text), tokens.im_end, *encode("\n")] if text else []


def user_opening(encode: Encode, tokens: SpecialTokens) -> list[int]:
    """What stands before a user's turn."""
    return [tokens.im_start, *encode("user\n")]


def user_closing(encode: Encode, tokens: SpecialTokens, said: str = "") -> list[int]:
    """What the user writes, and what stands between a user's turn and the reply."""
    return [*encode(said), tokens.im_end, *encode("\n"), tokens.im_start, *encode("assistant\n")]


def reply_closing(encode: Encode, tokens: SpecialTokens, *, ended: bool) -> list[int]:
    """What stands between a reply and the user's next turn. ended: whether the reply's last token is im_end."""
    return [*([] if ended else [tokens.im_end]), *encode("\n")]


def answer(encode: Encode, tokens: SpecialTokens, text: str) -> list[int]:
    """Token ids of a reply, im_end included."""
    return [*encode(text), tokens.im_end]


def voice_prompt(encode: Encode, tokens: SpecialTokens, transcript: str) -> list[int]:
    """Token ids of the text half of a voice prompt."""
    return [tokens.text_start, *encode(transcript), tokens.text_end]
