"""The training step of a Codec.

    input → encoder → latents → quantizer → decoder → made
                  teacher(input) ← head ┘     mel loss, wave loss (made, target) ┐
    discriminator(made), discriminator(target) → adversarial, feature loss ──────┴ balanced → gradient of the made sound → codec

One step: the codec by the balanced gradient, the commitment loss and, with a teacher, the distillation loss; its codebooks by
their running means; the discriminator by its hinge loss, on the same made sound. A training has up to three phases: an
autoencoder of latents as they are, trained by its mel spectrograms alone; then with the quantizer, whose codebooks have been
fitted to the latents; then with the discriminator.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.kernels import sums
from chroma_jax.models.codec import Codec
from chroma_jax.parallel.compiler_options import jit_step
from chroma_jax.parallel.sharding import RULES
from chroma_jax.training.codec.discriminator import Discriminator
from chroma_jax.training.codec.distillation import distillation_loss
from chroma_jax.training.codec.losses import (
    LOSSES,
    BalancerState,
    discriminator_loss,
    latent_loss,
    mel_distance,
    reconstruction_losses,
    spectrum_loss,
)
from chroma_jax.training.codec.modules import Heads, build_modules, split_modules, split_shapes
from chroma_jax.training.codec.pitch import PitchHead, pitch_loss, pitch_targets
from chroma_jax.training.codec.quantize import (
    Choice,
    Quantized,
    QuantizerTraining,
    Statistics,
    decoder_input,
    draw,
    perplexity,
    quantize,
    updated_codebooks,
)
from chroma_jax.training.codec.recipe import CodecTrainStepConfig, Phase
from chroma_jax.training.codec.state import CodecTrainState, Parts
from chroma_jax.training.initial_state import replicated, sharded_moments, sharded_weights, with_initial_weights
from chroma_jax.training.optimizer import learning_rate, make_optimizer, update_weights
from chroma_jax.training.state import skip_if_bad
from chroma_jax.utils.arrays import AnyArray
from chroma_jax.utils.tree_paths import filled, values
from data_pipelines.waves import WaveBatch

STATIC = ("config", "phase")
Metrics = dict[str, jax.Array]


def train_step(
    state: CodecTrainState, batch: WaveBatch, *, config: CodecTrainStepConfig, phase: Phase
) -> tuple[CodecTrainState, Metrics]:
    """Advances the state by one global batch. A step is applied as a whole or not at all."""
    codec, recipe, rows = config.codec, config.recipe, len(batch.input)
    key, choice_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
    choice = draw(choice_key, rows, codec.num_codebooks - codec.quantizer.num_semantic, recipe.quantizer)
    before, trained = state, (state.codec, state.heads)
    of_trained = lambda trained: forward(trained, before, batch, choice, key, config, phase)
    (made, _), pull, (metrics, statistics) = jax.vjp(of_trained, trained, has_aux=True)
    losses, gradient, balancer = {}, jnp.zeros_like(made), state.balancer
    if phase.decoded:
        discriminator = discriminator_of(state.discriminator, config) if phase.adversarial else None
        losses, gradient, balancer = reconstruction_losses(
            discriminator, made, batch.target, batch.mask, codec.sampling_rate, recipe.loss, balancer
        )
    (codec_gradient,) = pull((gradient / rows, jnp.float32(1)))
    (weights, heads), optimizer = update_weights(recipe.optimizer, codec_gradient, state.optimizer, trained)
    norm = sums.norm(codec_gradient)
    metrics |= losses | {"gradient_norm": norm, "learning_rate": learning_rate(recipe.optimizer)(state.step)}
    state = state._replace(step=state.step + 1, codec=weights, heads=heads, optimizer=optimizer, balancer=balancer)
    if statistics is not None:
        metrics |= usage(statistics)
        if not config.codebooks_frozen:
            state = state._replace(codebooks=with_batch_means(state.codebooks, statistics, recipe.quantizer))
    total = sum(losses.values(), start=norm)
    if phase.adversarial:
        state, value, discriminator_norm = discriminator_step(state, jax.lax.stop_gradient(made), batch.target, config)
        metrics["discriminator_loss"] = value
        total += value + discriminator_norm  # it only matters whether all are finite
    state, metrics["skipped"] = skip_if_bad(state, before, total, norm, config.skip_step_grad_norm)
    return state, metrics


def forward(
    trained: tuple[nnx.State, nnx.State],
    state: CodecTrainState,
    batch: WaveBatch,
    choice: Choice,
    key: jax.Array,
    config: CodecTrainStepConfig,
    phase: Phase,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Metrics, tuple[Statistics, Statistics] | None]]:
    """The reconstruction, and the losses that need no decoder, as functions of the trained weights.

    Args:
        trained: Weights of the Codec and of the heads.
        state: Supplies all other weights.
        batch: Recordings.
        choice: Which recordings are quantized, and by how many codebooks.
        key: Draws replacements of dead codes.
        config: Static configuration.
        phase: What takes part.

    Returns:
        ((reconstruction [B, S], weighted sum of the losses []), (metrics, statistics of both quantizer branches or None)).
    """
    recipe = config.recipe
    statistics: tuple[Statistics, Statistics] | None = None
    codec = nnx.merge(split_shapes(config)[0].codec, trained[0], state.frozen, state.codebooks)
    encoding = encode(codec, batch.input, choice, key, phase)
    heads = nnx.merge(split_shapes(config)[0].heads, trained[1])
    if encoding.branches is not None:
        semantic, acoustic = encoding.branches
        statistics = semantic.statistics, acoustic.statistics
    metrics = encoder_losses(codec, heads, encoding, batch, config)
    total = sum((getattr(recipe.loss, name) * value for name, value in metrics.items()), start=jnp.float32(0))
    if config.pitch_codebooks and encoding.branches is not None:
        with jax.named_scope("pitch"):
            value, terms = pitch_losses(heads.pitch, encoding.branches, choice, batch.target, config)
        total += recipe.pitch_weight * value
        metrics |= terms
    made = codec.decode_latents(encoding.decoder_input) if phase.decoded else jnp.zeros_like(batch.input)
    return (made, total), (metrics, statistics)


class Encoding(NamedTuple):
    """What the encoder and the quantizer compute of a batch.

    Attributes:
        decoder_input: [B, F, D].
        latents: [B, F, D].
        semantic: [B, F, D], output of the semantic branch.
        branches: The semantic and the acoustic branch; None without a quantizer.
    """

    decoder_input: jax.Array
    latents: jax.Array
    semantic: jax.Array
    branches: tuple[Quantized, Quantized] | None


def encode(codec: Codec, wave: AnyArray, choice: Choice, key: jax.Array, phase: Phase) -> Encoding:
    """Encodes float32 [B, S], whole frames. The other arguments are those of `forward`."""
    latents = codec.latents(wave)
    if not phase.quantized:
        branch = codec.quantizer.semantic
        projected = branch.project(latents)
        return Encoding(latents, latents, projected if branch.output is None else branch.output(projected), None)
    with jax.named_scope("codec_quantize"):
        semantic, acoustic = quantize(codec.quantizer, latents, choice, key)
    return Encoding(decoder_input(latents, semantic, acoustic, choice), latents, semantic.vectors, (semantic, acoustic))


def encoder_losses(codec: Codec, heads: Heads, encoding: Encoding, batch: WaveBatch, config: CodecTrainStepConfig) -> Metrics:
    """The losses of an encoding, by the names of their weights in `CodecLossConfig`."""
    weights, losses = config.recipe.loss, {}
    if encoding.branches is not None:
        losses["commitment"] = sum(branch.commitment for branch in encoding.branches) / 2
    if weights.latents:
        with jax.named_scope("latent_loss"):
            losses["latents"] = latent_loss(encoding.latents, codec.latents(batch.target), batch.mask)
    if heads.spectrum is not None:
        with jax.named_scope("spectrum_loss"):
            predicted = heads.spectrum(encoding.decoder_input)
            losses["spectrum"] = spectrum_loss(predicted, batch.target, config.codec.sampling_rate)
    if config.teacher is not None:
        with jax.named_scope("teacher"):
            assert heads.distillation is not None
            wave = cast(jax.Array, batch.input)
            losses["distillation"] = distillation_loss(heads.distillation(encoding.semantic), config.teacher(wave))
    return losses


def pitch_losses(
    head: PitchHead, branches: tuple[Quantized, Quantized], choice: Choice, target: AnyArray, config: CodecTrainStepConfig
) -> tuple[jax.Array, Metrics]:
    """The pitch teacher's loss [] and its terms, for the codebooks of ``config.pitch_codebooks``."""
    codec, codebooks = config.codec, config.pitch_codebooks
    chosen = jnp.concatenate([branch.chosen for branch in branches])
    vectors = jnp.concatenate([chosen[index] for index in codebooks], axis=-1)
    used = choice.levels + codec.quantizer.num_semantic > codebooks[-1]
    return pitch_loss(head(vectors), pitch_targets(target, codec.sampling_rate, codec.samples_per_frame), used)


def usage(statistics: tuple[Statistics, Statistics]) -> Metrics:
    """Perplexity of every codebook on a batch, [Q], and the smallest one as a share of the codebook's size."""
    perplexities = jnp.concatenate([perplexity(branch.counts) for branch in statistics])
    size = statistics[0].counts.shape[1]
    return {"perplexity": perplexities, "least_perplexity_share": jnp.min(perplexities) / size}


def with_batch_means(codebooks: nnx.State, statistics: tuple[Statistics, Statistics], config: QuantizerTraining) -> nnx.State:
    """The codebooks with the running means of one more batch, given the statistics of the semantic and acoustic branch."""
    before, after = values(codebooks), {}
    for name, branch in zip(("semantic", "acoustic"), statistics, strict=True):
        names = [f"quantizer/{name}/codebooks/{kind}" for kind in ("embed_sum", "cluster_usage")]
        embed_sum, cluster_usage = (before[n] for n in names)
        after |= dict(zip(names, updated_codebooks(embed_sum, cluster_usage, branch, config), strict=True))
    return filled(codebooks, after)


def discriminator_step(
    state: CodecTrainState, made: jax.Array, real: AnyArray, config: CodecTrainStepConfig
) -> tuple[CodecTrainState, jax.Array, jax.Array]:
    """Advances the discriminator. Returns the state, the discriminator's loss and the norm of its gradient."""
    value, gradient = jax.value_and_grad(discriminator_forward)(state.discriminator, made, real, config)
    weights, moments = update_weights(
        config.recipe.discriminator_optimizer, gradient, state.discriminator_optimizer, state.discriminator
    )
    return state._replace(discriminator=weights, discriminator_optimizer=moments), value, sums.norm(gradient)


def discriminator_forward(weights: nnx.State, made: jax.Array, real: AnyArray, config: CodecTrainStepConfig) -> jax.Array:
    """The discriminator's loss [] of reconstructions and recordings, float32 [B, S] each."""
    discriminator = discriminator_of(weights, config)
    return discriminator_loss(discriminator(made), discriminator(real), config.recipe.discriminator.loss)


def discriminator_of(weights: nnx.State, config: CodecTrainStepConfig) -> Discriminator:
    """The discriminator with some weights."""
    return nnx.merge(split_shapes(config)[0].discriminator, weights)


def codec_of(state: CodecTrainState, config: CodecTrainStepConfig) -> Codec:
    """The Codec of a training state."""
    return nnx.merge(split_shapes(config)[0].codec, state.codec, state.frozen, state.codebooks)


class Reconstruction(NamedTuple):
    """Reconstructed recordings, replicated on every device.

    Attributes:
        wave: float32 [B, S].
        mel_distance: float32 [B], the mel loss against the target.
        codes: int32 [B, F, Q].
    """

    wave: jax.Array
    mel_distance: jax.Array
    codes: jax.Array


@partial(jax.jit, static_argnames=STATIC, out_shardings=P())
def reconstruct(state: CodecTrainState, batch: WaveBatch, *, config: CodecTrainStepConfig, phase: Phase) -> Reconstruction:
    """Encodes and decodes a batch."""
    codec = codec_of(state, config)
    latents = codec.latents(batch.input)
    codes = codec.quantizer.encode(latents, config.codec.num_codebooks)
    wave = codec.decode(codes) if phase.quantized else codec.decode_latents(latents)
    distance = mel_distance(wave, batch.target, config.codec.sampling_rate, config.recipe.loss.resolutions)
    return Reconstruction(wave, distance, codes)


@partial(jax.jit, static_argnames="config", out_shardings=P())
def encode_latents(state: CodecTrainState, wave: jax.Array, *, config: CodecTrainStepConfig) -> jax.Array:
    """The encoder's latents [B, F, D] of waves [B, S], replicated on every device."""
    return codec_of(state, config).latents(wave)


@dataclasses.dataclass(frozen=True, eq=False)
class CodecTrainer:
    """A Codec training on one mesh. It holds neither arrays nor compiled programs.

    Attributes:
        config: Static configuration of its steps.
        mesh: The mesh, which must be set (``jax.set_mesh``) wherever a method is called.
        abstract: Shapes and shardings of the state.
    """

    config: CodecTrainStepConfig
    mesh: Mesh
    abstract: CodecTrainState

    @property
    def batch_sharding(self) -> WaveBatch:
        """Shardings of a batch."""
        waves, mask = self.wave_sharding, NamedSharding(self.mesh, RULES.param_spec(("batch",)))
        return WaveBatch._make((waves, waves, mask))

    @property
    def wave_sharding(self) -> NamedSharding:
        """Sharding of waves, [B, S]."""
        return NamedSharding(self.mesh, RULES.param_spec(("batch", None)))

    def init(self, weights: Mapping[str, jax.Array] = MappingProxyType({})) -> CodecTrainState:
        """The state before the first step. Weights by path replace random ones."""
        draw = lambda: split_modules(build_modules(self.config), self.config)[1].weights()
        state = with_initial_weights(self.abstract, draw, weights)
        step, balancer = jax.device_put((jnp.int32(0), BalancerState.zeros(LOSSES)), self.abstract.step.sharding)
        recipe = self.config.recipe
        return state._replace(
            step=step,
            optimizer=jax.jit(make_optimizer(recipe.optimizer).init)((state.codec, state.heads)),
            discriminator_optimizer=jax.jit(make_optimizer(recipe.discriminator_optimizer).init)(state.discriminator),
            balancer=balancer,
        )

    def train_step(self, state: CodecTrainState, batch: WaveBatch, phase: Phase = Phase()) -> tuple[CodecTrainState, Metrics]:
        """The compiled `train_step`. The arrays of ``state`` are donated."""
        return self._jitted()(state, batch, config=self.config, phase=phase)

    def trace(self, batch: WaveBatch, phase: Phase = Phase()) -> jax.stages.Traced:
        """`train_step` traced for an abstract batch, to be lowered and compiled ahead of time."""
        return self._jitted().trace(self.abstract, batch, config=self.config, phase=phase)

    def reconstruct(self, state: CodecTrainState, batch: WaveBatch, phase: Phase = Phase()) -> Reconstruction:
        """The compiled `reconstruct`."""
        return reconstruct(state, batch, config=self.config, phase=phase)

    def latents(self, state: CodecTrainState, wave: jax.Array) -> jax.Array:
        """The compiled `encode_latents`."""
        return encode_latents(state, wave, config=self.config)

    def codec(self, state: CodecTrainState) -> Codec:
        """The Codec of a state."""
        return codec_of(state, self.config)

    def _jitted(self) -> jax.stages.Wrapped:
        return jit_step(train_step, self.mesh.devices.flat[0], jnp.dtype(jnp.float32), STATIC)


def make_codec_trainer(config: CodecTrainStepConfig, mesh: Mesh) -> CodecTrainer:
    """The trainer of a configuration on a mesh, which must be set (``jax.set_mesh``).

    Raises:
        InputError: The mesh does not divide a weight, a freeze pattern matches no weight, or the teacher does not fit.
    """
    _, shapes = split_shapes(config)
    parts = Parts(*(sharded_weights(part, mesh, config.codec.rules_of) for part in shapes))
    balancer = jax.eval_shape(lambda: BalancerState.zeros(LOSSES))
    step, balancer = replicated((jax.ShapeDtypeStruct((), jnp.int32), balancer), mesh)
    recipe = config.recipe
    moments = sharded_moments(make_optimizer(recipe.optimizer), (parts.codec, parts.heads), mesh)
    discriminator_moments = sharded_moments(make_optimizer(recipe.discriminator_optimizer), parts.discriminator, mesh)
    return CodecTrainer(config, mesh, CodecTrainState(step, *parts, moments, discriminator_moments, balancer))
