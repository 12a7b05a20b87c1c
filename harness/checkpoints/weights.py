"""Weights from a counter-based generator: the same bits on every machine, with every version of numpy and torch."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

_JITTER = 0.1
_TABLE = 0.5
_TIED_TABLE = 0.1


def uniform(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values in [-1, 1), a function of `key` and the position alone.

    Philox4x64 (Salmon et al., 2011) keyed by SHA-256 of `key`. The top 24 bits of each word become a float by exact
    arithmetic: no library's notion of a distribution enters, and no rounding.
    """
    digest = hashlib.sha256(key.encode()).digest()
    words = np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)).random_raw(
        int(np.prod(shape, dtype=np.int64))
    )
    return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)).reshape(shape)


def fill(model: nn.Module, seed: int = 0) -> None:
    """Sets every parameter, so that each one matters to the output.

    The usual 0.02 makes rows that hardly depend on the image. Matrices get the variance 1/fan_in, embedding tables
    0.5**2 behind the factor that some classes apply to them, and vectors (biases, norms) a jitter of 0.1 about the
    value that the model class gave them, or about 0 where it drew their entries at random. A table that is the
    language model's head too is smaller: with a large one every token follows itself, whatever the image.
    """
    tables = {
        id(module.weight): getattr(module, "scalar_embed_scale", 1.0)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    heads = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.from_numpy(uniform(f"{seed}/{name}", tuple(parameter.shape)))
            if id(parameter) in tables:
                size = _TIED_TABLE if id(parameter) in heads else _TABLE
                parameter.copy_(values * (size * 3**0.5 / tables[id(parameter)]))
            elif parameter.ndim > 1:
                parameter.copy_(values * (3 / fan_in(name, parameter)) ** 0.5)
            elif bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(values * _JITTER)
            else:
                parameter.copy_(values * _JITTER)


def fan_in(name: str, parameter: Tensor) -> int:
    """Summands of one output of a matrix or of a convolution; the experts of a layer are a stack of matrices."""
    return parameter.shape[-1] if ".experts." in name else parameter[0].numel()


def digest(model: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the parameters."""
    hasher = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        hasher.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        hasher.update(_bytes(parameter))
    return hasher.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
