"""The state of Codec training, and the one compiled step that advances it.

    wave → encoder → latents → quantizer → decoder → made
                                              mel loss ┐
    discriminator(made), discriminator(wave) → adversarial, feature loss ┴ balanced → gradient of the made sound → codec

One step: the codec by the balanced gradient and the commitment loss; its codebooks by their running means; the discriminator by
its hinge loss, on the same made sound.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from chroma_jax.layers.sharding import RULES, state_shardings
from chroma_jax.models.codec import Codec, CodecConfig
from chroma_jax.paths import filled, values
from chroma_jax.training.codec.discriminator import Discriminator, DiscriminatorConfig
from chroma_jax.training.codec.losses import (
    BalancerState,
    MelLossConfig,
    adversarial_loss,
    balanced,
    discriminator_loss,
    feature_loss,
    mel_loss,
)
from chroma_jax.training.codec.quantize import QuantizerTraining, draw, followed, mixed, perplexity, quantize
from chroma_jax.training.optimizer import OptimizerConfig, make_optimizer


@dataclasses.dataclass(frozen=True)
class CodecLossConfig:
    """mel, adversarial, features: shares of the balanced gradient. commitment: weight of the commitment loss, which is added."""

    mel: float = 1.0
    adversarial: float = 3.0
    features: float = 3.0
    commitment: float = 0.25
    resolutions: MelLossConfig = MelLossConfig()


@dataclasses.dataclass(frozen=True)
class CodecTrainingConfig:
    """Everything about how a codec is trained but data and duration."""

    loss: CodecLossConfig = CodecLossConfig()
    quantizer: QuantizerTraining = QuantizerTraining()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    codec_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=8e-4, b1=0.5, b2=0.9)
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, b1=0.5, b2=0.9)


class CodecTrainState(NamedTuple):
    """step: int32 [], steps taken. codec: weights that gradients reach; codebooks: those that follow their vectors."""

    step: jax.Array
    codec: nnx.State
    codebooks: nnx.State
    discriminator: nnx.State
    codec_optimizer: optax.OptState
    discriminator_optimizer: optax.OptState
    balancer: BalancerState


class CodecTrainer(NamedTuple):
    """The functions of a training on one mesh. train_step: (state, waves [B, S]) → (state, metrics); the old state is given
    up."""

    init: Callable[[], CodecTrainState]
    train_step: Callable[[CodecTrainState, jax.Array], tuple[CodecTrainState, dict[str, jax.Array]]]
    module: Callable[[CodecTrainState], Codec]
    wave_sharding: NamedSharding


def is_codebook(path, _) -> bool:
    return "codebooks" in path


def make_codec_trainer(codec: CodecConfig, config: CodecTrainingConfig, seed: int, mesh: Mesh) -> CodecTrainer:
    """Builds the functions for a mesh (which must be set, ``jax.set_mesh``).

    Raises: ChromaError for weights that the mesh does not divide.
    """
    codec_tx, judge_tx = make_optimizer(config.codec_optimizer), make_optimizer(config.discriminator_optimizer)
    build = lambda: (Codec(nnx.Rngs(seed), codec), Discriminator(nnx.Rngs(seed + 1), config.discriminator))

    def split(modules):
        made, judge = modules
        graph, codebooks, weights = nnx.split(made, is_codebook, ...)
        judge_graph, judge_weights = nnx.split(judge)
        return (graph, judge_graph), (weights, codebooks, judge_weights)

    (graph, judge_graph), abstract = split(nnx.eval_shape(build))
    places = tuple(state_shardings(state, mesh, RULES) for state in abstract)
    rest = NamedSharding(mesh, P())
    # run once: on CPU, optimising the random generator of every weight would take longer than all the rest of the start
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    fresh = jax.jit(lambda: split(build())[1], out_shardings=places, compiler_options=options)

    def init() -> CodecTrainState:
        weights, codebooks, judge = fresh()
        step, balancer = jax.device_put((jnp.int32(0), BalancerState.zeros(3)), rest)
        return CodecTrainState(
            step, weights, codebooks, judge, jax.jit(codec_tx.init)(weights), jax.jit(judge_tx.init)(judge), balancer
        )

    def train_step(state: CodecTrainState, wave: jax.Array):
        key, choice_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        choice = draw(choice_key, len(wave), codec.num_codebooks - codec.quantizer.num_semantic, config.quantizer)

        def make(weights: nnx.State):
            made, semantic, acoustic = reconstructed(nnx.merge(graph, weights, state.codebooks), wave, choice, key)
            commitment = (semantic.commitment + acoustic.commitment) / 2
            return (made, commitment), (semantic.statistics, acoustic.statistics)

        (made, commitment), pull, statistics = jax.vjp(make, state.codec, has_aux=True)
        gradients, losses = judged(nnx.merge(judge_graph, state.discriminator), made, wave, codec.sampling_rate, config.loss)
        weights = jnp.array([config.loss.mel, config.loss.adversarial, config.loss.features], jnp.float32)
        gradient, balancer = balanced(gradients, weights, state.balancer)
        (codec_gradient,) = pull((gradient / len(wave), jnp.float32(config.loss.commitment)))
        updates, codec_optimizer = codec_tx.update(codec_gradient, state.codec_optimizer, state.codec)

        def judge_loss(judge: nnx.State):
            module = nnx.merge(judge_graph, judge)
            return discriminator_loss(module(jax.lax.stop_gradient(made)), module(wave))

        hinge, judge_gradient = jax.value_and_grad(judge_loss)(state.discriminator)
        judge_updates, judge_optimizer = judge_tx.update(judge_gradient, state.discriminator_optimizer, state.discriminator)
        metrics = losses | {"commitment": commitment, "discriminator_loss": hinge}
        metrics |= {"gradient_norm": optax.global_norm(codec_gradient)} | usage(statistics)
        return CodecTrainState(
            state.step + 1,
            optax.apply_updates(state.codec, updates),
            moved(state.codebooks, statistics, config.quantizer),
            optax.apply_updates(state.discriminator, judge_updates),
            codec_optimizer,
            judge_optimizer,
            balancer,
        ), metrics

    return CodecTrainer(
        init=init,
        train_step=jax.jit(train_step, donate_argnums=0),
        module=lambda state: nnx.merge(graph, state.codec, state.codebooks),
        wave_sharding=NamedSharding(mesh, RULES.at_rest(("batch", None))),
    )


def reconstructed(codec: Codec, wave: jax.Array, choice, key: jax.Array):
    """wave: [B, S], whole frames. Returns (made [B, S], what the semantic and the acoustic branch of the quantizer say)."""
    latents = codec.latents(wave)
    semantic, acoustic = quantize(codec.quantizer, latents, choice, key)
    return codec.sound(mixed(latents, semantic, acoustic, choice)), semantic, acoustic


def judged(
    discriminator: Discriminator, made: jax.Array, real: jax.Array, sample_rate: int, config: CodecLossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The gradients of the three balanced losses with respect to the made sound, float32 [3, B, S], and their values."""
    mel, mel_gradient = jax.value_and_grad(mel_loss)(made, real, sample_rate, config.resolutions)
    verdict = jax.lax.stop_gradient(discriminator(real))

    def opinions(made: jax.Array):
        judged = discriminator(made)
        return adversarial_loss(judged), feature_loss(judged, verdict)

    (adversarial, features), pull = jax.vjp(opinions, made)
    one, zero = jnp.float32(1), jnp.float32(0)
    gradients = jnp.stack([mel_gradient, pull((one, zero))[0], pull((zero, one))[0]])
    return gradients, {"mel_loss": mel, "adversarial_loss": adversarial, "feature_loss": features}


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
        after |= dict(zip(names, followed(*(before[n] for n in names), found, config), strict=True))
    return filled(codebooks, after)
