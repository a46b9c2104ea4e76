"""What a speaking model knows: whether it would write an answer to the letter, its questions given as text or as
pseudo-speech.

Needs no recordings, so it also measures what was withheld from training to choose a recipe by (`data_pipelines.facts`).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from chroma_jax.inference.placement import place_of, with_place
from chroma_jax.models.chroma import Chroma
from chroma_jax.sequence.chat_template import answer, question
from chroma_jax.sequence.interleave import NONE_TOKEN
from data_pipelines.facts import Exchange
from data_pipelines.pack import spread
from data_pipelines.tokenizer import encoder

ROWS, LENGTH = 32, 32  # conversations that are read at once; their length is rounded up to a multiple of this
GIVEN = ("typed", "pseudo_speech")


def evaluate_knowledge(model: Chroma, tokenizer: Tokenizer, asked: Mapping[str, Sequence[Exchange]], system: str = "") -> dict:
    """By the name of each group: how many questions it has, and the shares answered right when they are typed, and when they are
    laid out as speech that was heard without an error."""
    encode, tokens, rng = encoder(tokenizer), model.config.tokens, np.random.default_rng(0)
    layouts = {"typed": lambda q: {"said": q}, "pseudo_speech": lambda q: {"heard": spread(encode(q), tokens.pad, rng)}}
    found: dict[str, dict] = {name: {"questions": len(exchanges)} for name, exchanges in asked.items() if exchanges}
    for given in GIVEN:
        rows = [
            (question(encode, tokens, **layouts[given](e.question), system=system), answer(encode, tokens, e.answer))
            for name in found
            for e in asked[name]
        ]
        right = iter(would_write(model, rows))
        for name, values in found.items():
            values[given] = float(np.mean([next(right) for _ in asked[name]]))
    return found


def would_write(model: Chroma, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[bool]:
    """Whether greedy decoding would continue each row's first tokens with its second ones: as it takes the likeliest token of
    each step, it does so if each is the likeliest after all that stand before it."""
    longest = max((len(a) + len(b) for a, b in rows), default=0)
    length = -(-longest // LENGTH) * LENGTH
    graph, state = nnx.split(model.reasoner)

    @jax.jit
    def likeliest(state, tokens, segments):
        reasoner, (batch, length) = nnx.merge(graph, state), tokens.shape
        nothing = jnp.zeros((batch, 1, model.config.reasoner.text.hidden_size), jnp.float32)
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        hidden = reasoner.read(nothing, tokens, positions, segments, jnp.full_like(tokens, NONE_TOKEN))
        return jnp.argmax(reasoner.logits(hidden), -1)

    found = []
    for start in range(0, len(rows), ROWS):
        tokens, segments = np.zeros((2, ROWS, length), np.int32)
        for i, (given, wanted) in enumerate(rows[start : start + ROWS]):
            tokens[i, : len(given) + len(wanted)] = [*given, *wanted]
            segments[i, : len(given) + len(wanted)] = 1
        with with_place(place_of(jax.tree.leaves(state)[0])):
            written = np.asarray(likeliest(state, tokens, segments))
        for i, (given, wanted) in enumerate(rows[start : start + ROWS]):
            at = len(given) - 1
            found.append(written[i, at : at + len(wanted)].tolist() == list(wanted))
    return found
