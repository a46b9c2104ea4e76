"""Batches change nothing: whatever else a batch holds, each row says what it says alone, and what training's forward pass
predicts for it.

Random conversations of random lengths, greedy and sampled, join a batch of three slots at random times; they end by
themselves, at the limit, or are cancelled; slots are used again.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_speaker import CODES, CONFIG, LEVELS, Case, drawn, edited, rescored

from chroma_jax.inference import state as states
from chroma_jax.inference import step as steps
from chroma_jax.inference.generator import Generator, counted_compilations
from chroma_jax.inference.prompt import stack
from chroma_jax.inference.sampling import Sampling
from chroma_jax.inference.state import Capacity, StreamState
from chroma_jax.layers.kv_cache import KVCache
from chroma_jax.models.chroma import Chroma
from chroma_jax.models.codec import Codec
from chroma_jax.sequence.interleave import NONE_TOKEN, opens_pair

SLOTS, MAX_FRAMES = 3, 12
# every conversation below fits into these buckets, so that few programs are compiled
CAPACITY = Capacity.of(64, 64, MAX_FRAMES)
# EOS and im_end have stronger opinions than other codes and tokens, so that now and then they are chosen
CODE_SCALE = np.where(np.arange(CONFIG.audio_vocab_size) == CONFIG.codebook_eos_token_id, 3.0, 1.0).astype(np.float32)
TOKEN_SCALE = np.where(np.arange(CONFIG.reasoner.vocab_size) == CONFIG.tokens.im_end, 3.5, 1.0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversation. samples, transcript, frames: lengths of the question, of the voice's text and of its recording.

    arrival: the step that it waits for. cancelled: after so many frames, or None.
    """

    samples: int
    transcript: int
    frames: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    arrival: int = 0
    cancelled: int | None = None

    @functools.cached_property
    def case(self) -> Case:
        rng = np.random.default_rng(self.seed)
        question = rng.integers(-3000, 3000, self.samples).astype(np.int16)
        codes = rng.integers(0, CODES, (self.frames, LEVELS))
        return Case(question, codes, "".join(map(chr, rng.integers(97, 123, self.transcript))))

    @property
    def most(self) -> int:
        return MAX_FRAMES if self.cancelled is None else self.cancelled


ROWS = st.builds(
    Row,
    samples=st.integers(320, 16_000),
    transcript=st.integers(0, 10),
    frames=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 4]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 2**31 - 1),
    arrival=st.integers(0, 16),
    cancelled=st.none() | st.none() | st.integers(0, MAX_FRAMES - 1),
)


class Programs:
    """The compiled programs and the weights that all examples share."""

    def __init__(self):
        rng = np.random.default_rng(4)
        model, codec = drawn(lambda: Chroma(nnx.Rngs(0), CONFIG), rng), drawn(lambda: Codec(nnx.Rngs(0), CONFIG.codec), rng)
        heads = {"backbone/head/kernel": CODE_SCALE, "decoder/heads": CODE_SCALE, "reasoner/head/kernel": TOKEN_SCALE}
        self.model = edited(model, {name: lambda w, by=by: w * by for name, by in heads.items()})
        self.speaker = Generator(self.model, codec)
        self.idle = jax.jit(lambda: states.idle(CONFIG, codec, SLOTS, CAPACITY, jnp.float32))
        self.join, self.cancel = jax.jit(states.join), jax.jit(states.cancel)
        self.traced = jax.jit(lambda model, state: steps.traced_frame(model, state, "trained"))
        self.spoil = jax.jit(spoiled)
        self.alone = functools.cache(self._alone)

    def start(self, rows: list[Row]) -> StreamState:
        return self.speaker.start(*arguments(rows), MAX_FRAMES)

    def _alone(self, row: Row) -> "Said":
        said = Said()
        for output in self.speaker.frames(self.start([row]), row.most):
            said.add(output, 0)
        return said


def arguments(rows: list[Row]):
    """Prompt, sampling settings and random keys of a batch."""
    kinds = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32}
    sampling = Sampling(**{name: np.array([getattr(r, name) for r in rows], kind) for name, kind in kinds.items()})
    keys = jnp.stack([jax.random.key(r.seed) for r in rows])
    return stack([r.case.prompt for r in rows]), sampling, keys


def spoiled(state: StreamState, mask: jax.Array) -> StreamState:
    """NaN in every number of some rows."""

    def one(x):
        cached = isinstance(x, KVCache)

        def fill(leaf):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            where = mask.reshape((1,) * cached + (-1,) + (1,) * (leaf.ndim - 1 - cached))
            return jnp.where(where, jnp.nan, leaf)

        return jax.tree.map(fill, x)

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, KVCache))


class Said:
    """What a row gave away, frame by frame, up to its end; and its logits."""

    def __init__(self):
        self.codes, self.tokens, self.samples, self.ended = [], [], [], False
        self.fed_tokens, self.token_logits, self.frame_logits = [], [], []

    def add(self, output: steps.StepOutput, row: int, trace: steps.StepTrace | None = None) -> None:
        self.ended = not output.live[row]
        if not self.ended:
            self.codes.append(output.codes[row].tolist())
            self.tokens.append(int(output.token[row]))
            self.samples.append(output.samples[row])
        if trace is None:
            return
        if trace.text.wanted[row]:
            self.fed_tokens.append(int(trace.text.token[row]))
            self.token_logits.append(trace.text.logits[row])
        self.frame_logits.append(np.concatenate([trace.logits[row][None], trace.decoder_logits[row]]))


def converse(programs: Programs, rows: list[Row], *, together: bool, even: bool, spoil: bool) -> list[Said]:
    """Runs a batch through its events.

    together: the first rows are prefilled as one batch, instead of joining idle slots. even: rows join before even steps
    only. spoil: freed slots are filled with NaN.
    """
    said = [Said() for _ in rows]
    slots: list[int | None] = [None] * SLOTS
    waiting = sorted(range(len(rows)), key=lambda i: rows[i].arrival)
    if together:
        slots = [waiting.pop(0) if waiting else None for _ in slots]
        state = programs.start([rows[0 if i is None else i] for i in slots])
        state = programs.cancel(state, np.array([i is None for i in slots]))
    else:
        state = programs.idle()
    decode_step = 0
    while waiting or any(i is not None for i in slots):
        done = [i is not None and len(said[i].codes) >= rows[i].most for i in slots]
        state = programs.cancel(state, np.array(done))
        slots = [None if d else i for i, d in zip(slots, done)]
        if spoil:
            state = programs.spoil(state, np.array([i is None for i in slots]))
        for slot, i in enumerate(slots):
            if i is None and waiting and rows[waiting[0]].arrival <= decode_step and (opens_pair(decode_step) or not even):
                slots[slot] = waiting.pop(0)
                state = programs.join(state, programs.start([rows[slots[slot]]]), slot)
        trace = jax.device_get(programs.traced(programs.model, state)[1])
        state, output = programs.speaker.programs.step(programs.speaker.weights, state)
        output = jax.device_get(output)
        for slot, i in enumerate(slots):
            if i is None:
                assert not output.live[slot] and output.token[slot] == NONE_TOKEN
            elif len(said[i].codes) < rows[i].most:
                np.testing.assert_array_equal(trace.codes[slot], output.codes[slot])
                said[i].add(output, slot, trace)
                slots[slot] = None if said[i].ended else i
        decode_step += 1
    return said


@pytest.fixture(scope="module")
def programs() -> Programs:
    return Programs()


def conversations(check: Callable[[list[Row], list[Said]], None], programs: Programs, examples: int) -> None:
    """Calls ``check`` with random batches and what their rows said."""

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(rows=st.lists(ROWS, min_size=1, max_size=6), together=st.booleans(), even=st.booleans(), spoil=st.booleans())
    def example(rows, together, even, spoil):
        check(rows, converse(programs, rows, together=together, even=even, spoil=spoil))

    example()


def test_each_row_of_a_batch_says_what_it_says_alone(programs):
    seen = Counter()

    def check(rows: list[Row], said: list[Said]) -> None:
        for row, ours in zip(rows, said):
            alone = programs.alone(row)
            assert (ours.codes, ours.tokens, ours.ended) == (alone.codes, alone.tokens, alone.ended)
            if ours.samples:  # compiled for one row and for three, sums may differ in their last digits
                np.testing.assert_allclose(ours.samples, alone.samples, atol=1e-5 * np.abs(alone.samples).max())
            seen["sampled" if row.temperature else "greedy"] += 1
            seen["joined late"] += row.arrival > 0
            seen["cancelled"] += len(ours.codes) == row.cancelled
            seen["spoke to the limit"] += len(ours.codes) == MAX_FRAMES
            seen["ended early"] += ours.ended and bool(ours.codes)
            seen["closed its text"] += CONFIG.tokens.im_end in ours.tokens

    conversations(check, programs, 20)
    assert len(seen) == 7 and all(seen.values())  # else something was never tried


def test_stepwise_logits_in_a_batch_are_those_of_teacher_forcing(programs):
    """The cached and the whole pass add up in different orders, and here and there these random models make much of it: so a
    position may differ by the golden suite's tolerance for float32 logits, or by four times what half a unit in the last place
    of every weight changes at that very position."""
    nudged = [rounded_otherwise(programs.model, seed) for seed in range(4)]

    def check(rows: list[Row], said: list[Said]) -> None:
        for row, ours in zip(rows, said):
            if not ours.frame_logits:
                continue
            codes = np.array(ours.codes, np.int32).reshape(-1, LEVELS)
            packed = row.case.packed(ours.fed_tokens, codes)
            whole, *others = (jax.device_get(rescored(model, packed)) for model in (programs.model, *nudged))
            for i, (found, scale) in enumerate([(ours.token_logits, TOKEN_SCALE), (ours.frame_logits, CODE_SCALE)]):
                difference = farthest((np.array(found) - whole[i][: len(found)]) / scale)
                rounding = np.max([farthest((other[i] - whole[i])[: len(found)] / scale) for other in others], axis=0)
                assert (difference <= np.maximum(2e-4, 4 * rounding)).all(), (difference, rounding)

    conversations(check, programs, 8)


def rounded_otherwise(model: Chroma, seed: int) -> Chroma:
    """Every weight half a unit in the last place up or down."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(model)
    nudge = lambda x: jnp.asarray(x * (1 + 2.0**-24 * rng.choice([-1, 1], x.shape)), jnp.float32)
    return nnx.merge(graph, jax.tree.map(nudge, state))


def farthest(difference: np.ndarray) -> np.ndarray:
    """The largest absolute value at each position: [T, …] → [T]."""
    return np.abs(difference).reshape(len(difference), -1).max(axis=1)


def test_rows_come_and_go_without_compiling_anew(programs):
    rows = [Row(5000 * n, n, 9 * n, 0.7, 4, 0.9, seed=n, arrival=n, cancelled=None if n % 2 else 3) for n in range(1, 4)]
    events = functools.partial(converse, programs, together=False, even=True, spoil=False)
    events(rows)
    with counted_compilations() as compiled:
        events([dataclasses.replace(row, seed=row.seed + 10, frames=row.frames + 1, arrival=5 - row.arrival) for row in rows])
    assert compiled.count == 0


def test_a_row_of_another_capacity_cannot_join(programs):
    larger = programs.speaker.start(*arguments([Row(640, 1, 1, 0.0, 0, 1.0, seed=0)]), 2 * MAX_FRAMES)
    with pytest.raises(ValueError, match=r"reasoner_cache of the row is .* of the batch .* fits"):
        states.join(programs.idle(), larger, 0)
