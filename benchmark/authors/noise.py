"""Prepared noise, and samplers that hand it out: so two codes draw the same numbers."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor


class Noise(NamedTuple):
    """What a sampler is to return: numbers of the standard normal, or of the uniform in [0, 1)."""

    kind: Literal["normal", "uniform"]
    values: np.ndarray


class NoiseError(Exception):
    """An update asks for other noise than was prepared for it."""


class NoiseQueue:
    """Prepared noise in place of a sampler, in the order in which one side asks for it.

    order has names of noise; a tuple of names is one draw of all of them, stacked.
    """

    def __init__(self, noise: dict[str, Noise], order: list[str | tuple[str, ...]]):
        self.waiting = collections.deque()
        for names in order:
            if isinstance(names, tuple):
                values = np.stack([noise[name].values for name in names])
                self.waiting.append((" and ".join(names), Noise(noise[names[0]].kind, values)))
            else:
                self.waiting.append((names, noise[names]))

    def draw(self, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        """The next noise. NoiseError unless it is of that kind and shape."""
        asked = f"{kind} noise of shape {tuple(shape)}"
        if not self.waiting:
            raise NoiseError(f"asks for {asked} when all was drawn")
        name, noise = self.waiting.popleft()
        if (noise.kind, noise.values.shape) != (kind, tuple(shape)):
            prepared = f"{noise.kind} noise of shape {noise.values.shape}"
            raise NoiseError(f"asks for {asked} where {name!r} is {prepared}")
        return noise.values

    def check_used_up(self) -> None:
        if self.waiting:
            names = ", ".join(name for name, _ in self.waiting)
            raise NoiseError(f"never asks for {names}")


@contextlib.contextmanager
def torch_samplers(queue: NoiseQueue) -> Iterator[None]:
    """Let torch's samplers draw from a queue."""

    def draw(kind: str, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(queue.draw(kind, shape).copy())

    def rsample(normal: torch.distributions.Normal, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return normal.loc + draw("normal", (*sample_shape, *normal.loc.shape)) * normal.scale

    def uniform_(tensor: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return tensor.copy_(low + (high - low) * draw("uniform", tensor.shape))

    replaced = [
        (torch, "randn_like", lambda like: draw("normal", like.shape)),
        (torch, "randn", lambda *shape, device=None: draw("normal", shape)),
        (torch, "rand_like", lambda like: draw("uniform", like.shape)),
        (torch.Tensor, "uniform_", uniform_),
        (torch.distributions.Normal, "rsample", rsample),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        yield
