"""Compiler options of a training step, by chip. `train` and `plan` compile with the same ones."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from chroma_jax.parallel.sharding import Device

TPU = {
    # windowed products turn gathers of weights into chains of permutes, which cost more than they hide
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# Gathers are taken apart to run beside products. On chips other than v5e newer compilers refuse that, as it may compute wrongly.
FUSED_GATHERS = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
}
SPARSE_CORES = [
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}" for kind in ("all_gather", "all_reduce", "reduce_scatter")
]
# A chip's sparse cores run collectives beside whatever the others compute. Of larger programs the compilers that earlier versions
# of JAX come with die then (libtpu 0.0.42 and 0.0.44, offload_collective_strategies.cc).
OFFLOADS = jax.__version_info__ >= (0, 12)
# By how ``device_kind`` begins. v6e has 128 MiB of vector memory, of which a fusion may use 32 unless it is told more, and takes
# its collectives to its sparse cores when it is told to; Ironwood does by itself.
BY_KIND = {
    "TPU v5 lite": FUSED_GATHERS,
    "TPU v6": {"xla_tpu_scoped_vmem_limit_kib": 98_304} | (dict.fromkeys(SPARSE_CORES, True) if OFFLOADS else {}),
    "TPU7": {} if OFFLOADS else dict.fromkeys(SPARSE_CORES, False),
}
# XLA's own loops use half of AVX-512's width by themselves; without AVX-512 this changes nothing.
ON_CPU = {"xla_cpu_prefer_vector_width": 512}
# oneDNN's products of 16-bit numbers, with AMX or AVX-512 on processors that have it, are up to three times as fast as XLA's own,
# which would be asked first. jaxlib 0.10 has none of oneDNN's.
HALVES_ON_CPU = {"xla_cpu_experimental_onednn_custom_call": True, "xla_cpu_experimental_ynn_fusion_type": ""}


def options(device: Device, compute: jnp.dtype) -> dict[str, str | int | bool]:
    """Compiler options for a mesh of such devices and the type that products are in; none for GPUs."""
    if device.platform == "cpu":
        return ON_CPU | (HALVES_ON_CPU if compute == jnp.bfloat16 and jax.__version_info__ >= (0, 11) else {})
    if device.platform != "tpu":
        return {}
    more = (found for kind, found in BY_KIND.items() if device.device_kind.startswith(kind))
    return TPU | next(more, {})


def jit_step(
    step: Callable, device: Device, compute: jnp.dtype, static_argnames: tuple[str, ...] = ("config",)
) -> jax.stages.Wrapped:
    """Compiles a training step as it runs on a mesh of such devices.

    Args:
        step: A module-level function. Its first argument, the state, is donated.
        device: Any device of the mesh.
        compute: Dtype of the matmuls.
        static_argnames: Arguments that are hashable and compiled in.

    Returns:
        The jitted function, one per process for equal compiler options. Calls with equal static arguments, and arguments of
        equal shapes and shardings, share one compilation.
    """
    return _jit_step(step, static_argnames, tuple(options(device, compute).items()))


@functools.cache
def _jit_step(step: Callable, static_argnames: tuple[str, ...], compiler_options: tuple) -> jax.stages.Wrapped:
    return jax.jit(step, static_argnames=static_argnames, donate_argnums=0, compiler_options=dict(compiler_options))
