"""Where a peer in PyTorch computes."""

import jax

from chroma_jax.utils.errors import InputError


def torch_device() -> str:
    """PyTorch's name of the device that JAX computes on, "cpu" or "cuda".

    Raises: InputError where PyTorch does not reach that.
    """
    import torch  # pyright: ignore[reportMissingImports]

    device = jax.devices()[0]
    if device.platform == "cpu":
        return "cpu"
    if device.platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise InputError(f"JAX computes on {device.device_kind}, which this PyTorch does not reach: give --peer none")
