"""The one setting for what the reference implementation does wrong: "corrected", the default, or "reference", to compare
with it.

The Decoder's positions. corrected: as trained, h at 0, c0 at 1, c1 at 2 … reference: h at 0, c0 at 0, c1 at 1 …

Rows of different lengths in a batch. corrected: each gives what it gives alone. Nothing is fed but its own sequence, and it
ends with its own frame of zeros. reference: the voice prompt is padded inside, before the transcript and after the
recording; a row whose text has ended is still fed a pair when another row is, and its frame is predicted there. Both count as
positions and are masked as keys. A frame that is zero but for its last code finishes a row, which yet goes on until every row
is finished; it is heard up to its first frame of zeros. Codes that the Codec does not have may be chosen.

The Codec's attention. corrected: `CodecConfig.sliding_window`, by default 250 positions. reference: full causal.

The setting acts where a batch is put together (`prompt.stack`), on the step, and on the Codec of a `Generator`.
"""

import dataclasses
from typing import Literal

from flax import nnx

from chroma_jax.models.codec import Codec
from chroma_jax.utils.errors import InputError

Compatibility = Literal["corrected", "reference"]

Positions = Literal["trained", "reference"]  # of the Decoder


def decoder_positions(compatibility: Compatibility) -> Positions:
    return "reference" if is_reference(compatibility) else "trained"


def codec_used(codec: Codec, compatibility: Compatibility) -> Codec:
    return with_window(codec, None) if is_reference(compatibility) else codec


def is_reference(compatibility: Compatibility) -> bool:
    """Raises: InputError for an unknown setting."""
    if compatibility not in ("corrected", "reference"):
        raise InputError(f'compatibility is {compatibility!r}, expected "corrected" or "reference"')
    return compatibility == "reference"


def with_window(codec: Codec, window: int | None) -> Codec:
    """The same weights with another attention window."""
    config = dataclasses.replace(codec.config, sliding_window=window)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Codec(nnx.Rngs(0), config)))
    return nnx.merge(graph, nnx.state(codec))
