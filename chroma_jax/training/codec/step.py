"""The state of Codec training, and the one compiled step that advances it.

    input → encoder → latents → quantizer → decoder → made
                  teacher(input) ← head ┘     mel loss, wave loss (made, target) ┐
    discriminator(made), discriminator(target) → adversarial, feature loss ──────┴ balanced → gradient of the made sound → codec

One step: the codec by the balanced gradient, the commitment loss and, with a teacher, the distillation loss; its codebooks by
their running means; the discriminator by its hinge loss, on the same made sound. A training has up to three phases: an
autoencoder of latents as they are, trained by its mel spectrograms alone; then with the quantizer, whose codebooks have been
fitted to the latents; then with the discriminator.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import sums
from chroma_jax.layers.linear import Linear, zeros
from chroma_jax.models.codec import Codec, CodecConfig
from chroma_jax.parallel.compiler_options import options as compiler_options
from chroma_jax.parallel.sharding import RULES, state_shardings
from chroma_jax.training.codec.discriminator import Discriminator, DiscriminatorConfig
from chroma_jax.training.codec.distillation import Teacher, distillation_loss, teacher_width
from chroma_jax.training.codec.losses import (
    LOSSES,
    SPECTRA,
    SPECTRUM_BINS,
    BalancerState,
    CodecLossConfig,
    discriminator_loss,
    latent_loss,
    mel_distance,
    reconstruction_losses,
    spectrum_loss,
)
from chroma_jax.training.codec.pitch import PitchHead, codebook_indices, pitch_loss, pitch_targets
from chroma_jax.training.codec.quantize import (
    Choice,
    Quantized,
    QuantizerTraining,
    decoder_input,
    draw,
    perplexity,
    quantize,
    updated_codebooks,
)
from chroma_jax.training.codec.state import CodecTrainState, Parts, abstract_state
from chroma_jax.training.optimizer import OptimizerConfig, is_frozen, learning_rate, make_optimizer
from chroma_jax.training.state import skip_if_bad
from chroma_jax.utils.tree_paths import filled, values
from data_pipelines.waves import WaveBatch


@dataclasses.dataclass(frozen=True)
class CodecRecipe:
    """How a codec is trained, data and duration aside.

    Attributes:
        decoder_start_step: the step at which the decoder joins. Until then the encoder is trained by the losses that need no
            decoder: spectrum, pitch, distillation, latents and commitment.
        quantizer_start_step: the step at which the quantizer joins.
        discriminator_start_step: the step at which the discriminator joins.
        teacher: of the semantic codebook, ``module:function`` or the run folder of a speaking model, see
            `chroma_jax.runs.codec_teacher`; empty for none.
        pitch_weight: weight of the pitch teacher's loss, which takes part while the quantizer does, see
            `chroma_jax.training.codec.pitch`; 0 for none.
        pitch_codebooks: indices of the codebooks that the pitch teacher reads; negative ones count from the last.
        loss: shares and weights of the losses.
        quantizer: how codebooks follow their vectors.
        discriminator: sizes and loss of the discriminator.
        optimizer: of the codec. ``freeze`` names its weights; with ``encoder``, ``downsample`` and ``quantizer`` frozen only the
            decoder is trained, and codes stay as they are.
        discriminator_optimizer: of the discriminator.
    """

    decoder_start_step: int = 0
    quantizer_start_step: int = 0
    discriminator_start_step: int = 0
    teacher: str = ""
    pitch_weight: float = 0.0
    pitch_codebooks: tuple[int, ...] = (1,)
    loss: CodecLossConfig = CodecLossConfig()
    quantizer: QuantizerTraining = QuantizerTraining()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=8e-4, b1=0.5, b2=0.9)
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, b1=0.5, b2=0.9)

    def __post_init__(self):
        if self.pitch_weight < 0:
            raise ValueError(f"pitch_weight must not be negative, got {self.pitch_weight}")
        if self.pitch_weight and not self.pitch_codebooks:
            raise ValueError("pitch_weight is set, but pitch_codebooks names no codebook")


class Phase(NamedTuple):
    """What takes part in a step."""

    quantized: bool = True
    adversarial: bool = True
    decoded: bool = True


class Heard(NamedTuple):
    """Of held-out recordings, not sharded.

    Attributes:
        made: float32 [B, S], the reconstruction.
        distance: float32 [B], its mel loss against the target.
        codes: int32 [B, F, Q].
    """

    made: jax.Array
    distance: jax.Array
    codes: jax.Array


class CodecTrainer(NamedTuple):
    """The functions of a training on one mesh; nothing here holds an array.

    Attributes:
        abstract: shapes and shardings of the state.
        init: weights by path → state; weights that are not given are drawn at random.
        train_step: (state, batch, phase) → (state, metrics); the old state is donated.
        hear: (state, batch, phase) → `Heard`.
        latents: (state, input [B, S]) → latents [B, F, D], not sharded.
        module: state → the Codec.
        batch_sharding: of a `WaveBatch`.
    """

    abstract: CodecTrainState
    init: Callable[..., CodecTrainState]
    train_step: Callable[[CodecTrainState, WaveBatch, Phase], tuple[CodecTrainState, dict[str, jax.Array]]]
    hear: Callable[[CodecTrainState, WaveBatch, Phase], Heard]
    latents: Callable[[CodecTrainState, jax.Array], jax.Array]
    module: Callable[[CodecTrainState], Codec]
    batch_sharding: WaveBatch

    @property
    def wave_sharding(self) -> NamedSharding:
        """Sharding of waves, [B, S]."""
        return self.batch_sharding.input


class Heads(nnx.Module):
    """What teachers are predicted with; not part of the Codec.

    Attributes:
        distillation: from the semantic vectors to the teacher's features.
        pitch: from the vectors of some codebooks to pitch.
        spectrum: from the decoder's input to mel spectra.
    """

    def __init__(self, distillation: Linear | None, pitch: PitchHead | None, spectrum: Linear | None):
        self.distillation, self.pitch, self.spectrum = distillation, pitch, spectrum


class Modules(NamedTuple):
    """All that has weights in Codec training."""

    codec: Codec
    heads: Heads
    discriminator: Discriminator


def make_codec_trainer(
    codec: CodecConfig,
    recipe: CodecRecipe,
    seed: int,
    mesh: Mesh,
    teacher: Teacher | None = None,
    skip_step_grad_norm: float = 0.0,
) -> CodecTrainer:
    """Builds the functions for a mesh (which must be set, ``jax.set_mesh``). skip_step_grad_norm: of the codec's gradient, see
    `chroma_jax.training.state.applied`; a step is applied as a whole or not at all.

    Raises: InputError for weights that the mesh does not divide, or freeze patterns that do not fit.
    """
    tx, discriminator_tx = make_optimizer(recipe.optimizer), make_optimizer(recipe.discriminator_optimizer)
    rate, loss = learning_rate(recipe.optimizer), recipe.loss
    pitch_codebooks = codebook_indices(recipe.pitch_codebooks, codec.num_codebooks) if recipe.pitch_weight else ()
    settled = any(re.match(pattern, "quantizer/acoustic/codebooks") for pattern in recipe.optimizer.freeze)

    def build() -> Modules:
        width = None if teacher is None else teacher_width(teacher, codec)
        head = None if width is None else Linear(nnx.Rngs(seed + 2), {"embed": codec.hidden_size}, {"channels": width})
        channels = len(pitch_codebooks) * codec.quantizer.codebook_dim
        pitch = PitchHead(nnx.Rngs(seed + 3), channels) if pitch_codebooks else None
        spectra = {"channels": SPECTRA * SPECTRUM_BINS}
        spectrum = Linear(nnx.Rngs(seed + 4), {"embed": codec.hidden_size}, spectra, bias=zeros) if loss.spectrum else None
        heads = Heads(head, pitch, spectrum)
        return Modules(Codec(nnx.Rngs(seed), codec), heads, Discriminator(nnx.Rngs(seed + 1), recipe.discriminator))

    def split(modules: Modules):
        codebook = lambda path, _: "codebooks" in path
        graph, codebooks, frozen, weights = nnx.split(modules.codec, codebook, is_frozen(modules.codec, recipe.optimizer), ...)
        head_graph, heads = nnx.split(modules.heads)
        discriminator_graph, discriminator = nnx.split(modules.discriminator)
        return (graph, head_graph, discriminator_graph), Parts(weights, frozen, heads, codebooks, discriminator)

    (graph, head_graph, discriminator_graph), shapes = split(nnx.eval_shape(build))
    places = Parts(*(state_shardings(state, mesh, codec.rules_of) for state in shapes))
    rest = NamedSharding(mesh, P())
    # run once: on CPU, optimising the random generator of every weight would take longer than all the rest of the start
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None

    def fresh() -> CodecTrainState:
        parts = jax.jit(lambda: split(build())[1], out_shardings=places, compiler_options=options)()
        step, balancer = jax.device_put((jnp.int32(0), BalancerState.zeros(LOSSES)), rest)
        moments = jax.jit(tx.init)((parts.codec, parts.heads)), jax.jit(discriminator_tx.init)(parts.discriminator)
        return CodecTrainState(step, *parts, *moments, balancer)

    def init(given: Mapping[str, jax.Array] = MappingProxyType({})) -> CodecTrainState:
        return fresh().with_weights(given)

    def train_step(state: CodecTrainState, batch: WaveBatch, phase: Phase = Phase()):
        rows = len(batch.input)
        key, choice_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        choice = draw(choice_key, rows, codec.num_codebooks - codec.quantizer.num_semantic, recipe.quantizer)

        def make(trained: tuple[nnx.State, nnx.State]):
            module = nnx.merge(graph, trained[0], state.frozen, state.codebooks)
            passed, latents, meaning, branches = encoded(module, batch.input, choice, key, phase)
            heads, total, statistics = nnx.merge(head_graph, trained[1]), jnp.float32(0), None
            extra: dict[str, jax.Array] = {}
            if phase.quantized:
                statistics = tuple(branch.statistics for branch in branches)
                extra["commitment"] = sum(branch.commitment for branch in branches) / 2
            if loss.latents:
                with jax.named_scope("latent_loss"):
                    extra["latents"] = latent_loss(latents, module.latents(batch.target), batch.mask)
            if loss.spectrum:
                with jax.named_scope("spectrum_loss"):
                    extra["spectrum"] = spectrum_loss(heads.spectrum(passed), batch.target, codec.sampling_rate)
            if teacher is not None:
                with jax.named_scope("teacher"):
                    extra["distillation"] = distillation_loss(heads.distillation(meaning), teacher(batch.input))
            total = sum((getattr(loss, name) * value for name, value in extra.items()), start=total)
            if pitch_codebooks and phase.quantized:
                with jax.named_scope("pitch"):
                    value, terms = taught_pitch(heads.pitch, branches, choice, batch.target)
                total += recipe.pitch_weight * value
                extra |= terms
            made = module.decode_latents(passed) if phase.decoded else jnp.zeros_like(batch.input)
            return (made, total), (extra, statistics)

        def taught_pitch(head: PitchHead, branches: tuple[Quantized, Quantized], choice: Choice, target: jax.Array):
            chosen = jnp.concatenate([branch.chosen for branch in branches])
            vectors = jnp.concatenate([chosen[index] for index in pitch_codebooks], axis=-1)
            used = choice.levels + codec.quantizer.num_semantic > pitch_codebooks[-1]
            return pitch_loss(head(vectors), pitch_targets(target, codec.sampling_rate, codec.samples_per_frame), used)

        before, trained = state, (state.codec, state.heads)
        (made, _), pull, (metrics, statistics) = jax.vjp(make, trained, has_aux=True)
        losses, gradient, balancer = {}, jnp.zeros_like(made), state.balancer
        if phase.decoded:
            discriminator = nnx.merge(discriminator_graph, state.discriminator) if phase.adversarial else None
            losses, gradient, balancer = reconstruction_losses(
                discriminator, made, batch.target, batch.mask, codec.sampling_rate, loss, balancer
            )
        (codec_gradient,) = pull((gradient / rows, jnp.float32(1)))
        with jax.named_scope("optimizer"):
            updates, optimizer = tx.update(codec_gradient, state.optimizer, trained)
            weights, heads = optax.apply_updates(trained, updates)
        norm = sums.norm(codec_gradient)
        metrics |= losses | {"gradient_norm": norm, "learning_rate": rate(state.step)}
        state = state._replace(step=state.step + 1, codec=weights, heads=heads, optimizer=optimizer, balancer=balancer)
        if phase.quantized:
            metrics |= usage(statistics)
            if not settled:
                state = state._replace(codebooks=moved(state.codebooks, statistics, recipe.quantizer))
        sound = sum(losses.values(), start=norm)
        if phase.adversarial:
            state, metrics["discriminator_loss"], discriminator_norm = corrected(state, jax.lax.stop_gradient(made), batch.target)
            sound += metrics["discriminator_loss"] + discriminator_norm  # it only matters whether all are finite
        state, metrics["skipped"] = skip_if_bad(state, before, sound, norm, skip_step_grad_norm)
        return state, metrics

    def corrected(state: CodecTrainState, made: jax.Array, real: jax.Array) -> tuple[CodecTrainState, jax.Array, jax.Array]:
        """The discriminator's own step, its loss and the norm of its gradient."""

        def loss_of(discriminator: nnx.State):
            module = nnx.merge(discriminator_graph, discriminator)
            return discriminator_loss(module(made), module(real), recipe.discriminator.loss)

        value, gradient = jax.value_and_grad(loss_of)(state.discriminator)
        with jax.named_scope("optimizer"):
            updates, optimizer = discriminator_tx.update(gradient, state.discriminator_optimizer, state.discriminator)
            discriminator = optax.apply_updates(state.discriminator, updates)
        return state._replace(discriminator=discriminator, discriminator_optimizer=optimizer), value, sums.norm(gradient)

    def module(state: CodecTrainState) -> Codec:
        return nnx.merge(graph, state.codec, state.frozen, state.codebooks)

    def hear(state: CodecTrainState, batch: WaveBatch, phase: Phase = Phase()) -> Heard:
        latents = module(state).latents(batch.input)
        codes = module(state).quantizer.encode(latents, codec.num_codebooks)
        made = module(state).decode(codes) if phase.quantized else module(state).decode_latents(latents)
        return Heard(made, mel_distance(made, batch.target, codec.sampling_rate, loss.resolutions), codes)

    waves, mask = (NamedSharding(mesh, RULES.param_spec(axes)) for axes in (("batch", None), ("batch",)))
    return CodecTrainer(
        abstract=abstract_state(shapes, places, tx, discriminator_tx, rest),
        init=init,
        train_step=jax.jit(
            train_step,
            static_argnames="phase",
            donate_argnums=0,
            compiler_options=compiler_options(mesh.devices.flat[0], jnp.dtype(jnp.float32)),
        ),
        hear=jax.jit(hear, static_argnames="phase", out_shardings=rest),
        latents=jax.jit(lambda state, wave: module(state).latents(wave), out_shardings=rest),
        module=module,
        batch_sharding=WaveBatch(waves, waves, mask),
    )


def encoded(
    codec: Codec, wave: jax.Array, choice: Choice, key: jax.Array, phase: Phase
) -> tuple[jax.Array, jax.Array, jax.Array, tuple[Quantized, Quantized] | None]:
    """Encodes a batch.

    Args:
        wave: float32 [B, S], whole frames.
        choice: which recordings are quantized, and by how many codebooks.
        key: for moving dead codes.
        phase: whether there is a quantizer.

    Returns:
        (the decoder's input [B, F, D], the latents [B, F, D], the semantic branch's output [B, F, D], what both branches make of
        them or None).
    """
    latents = codec.latents(wave)
    if not phase.quantized:
        branch = codec.quantizer.semantic
        projected = branch.project(latents)
        return latents, latents, projected if branch.output is None else branch.output(projected), None
    with jax.named_scope("codec_quantize"):
        semantic, acoustic = quantize(codec.quantizer, latents, choice, key)
    return decoder_input(latents, semantic, acoustic, choice), latents, semantic.vectors, (semantic, acoustic)


def usage(statistics) -> dict[str, jax.Array]:
    """Of every codebook, how many codes a batch would need to be as varied: its perplexity, and the smallest of all as a
    share."""
    found = jnp.concatenate([perplexity(branch.count) for branch in statistics])
    size = statistics[0].count.shape[1]
    return {"perplexity": found, "least_perplexity_share": jnp.min(found) / size}


def moved(codebooks: nnx.State, statistics, config: QuantizerTraining) -> nnx.State:
    """The codebooks after a batch. statistics: of the semantic and of the acoustic branch."""
    before, after = values(codebooks), {}
    for name, found in zip(("semantic", "acoustic"), statistics, strict=True):
        names = [f"quantizer/{name}/codebooks/{kind}" for kind in ("embed_sum", "cluster_usage")]
        after |= dict(zip(names, updated_codebooks(*(before[n] for n in names), found, config), strict=True))
    return filled(codebooks, after)
