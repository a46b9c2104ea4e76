"""Where a peer in PyTorch computes."""

import jax

from chroma_jax.utils.errors import ChromaError


def torch_device() -> str:
    """PyTorch's name of the device that JAX computes on, "cpu" or "cuda".

    Raises: ChromaError where PyTorch does not reach that.
    """
    import torch

    device = jax.devices()[0]
    if device.platform == "cpu":
        return "cpu"
    if device.platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise ChromaError(f"JAX computes on {device.device_kind}, which this PyTorch does not reach: give --peer none")
