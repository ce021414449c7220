"""Random numbers keyed by their purpose, so that they do not depend on call order, machine or library version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray


def seed_of(*key: int | str) -> int:
    """Return a 128-bit seed: the BLAKE2b hash of the key as JSON, so that 1, "1" and ("1", "") differ."""
    return int.from_bytes(blake2b(json.dumps(key).encode(), digest_size=16).digest(), "big")


def permutation(size: int, *key: int | str) -> NDArray[np.int64]:
    """Return a uniform permutation of 0 … size-1, (size,) int64: the order that sorts `size` raw 64-bit draws.

    It uses raw PCG64 output because NumPy guarantees that not to change between versions, unlike its sampling methods.
    """
    draws = np.random.PCG64(seed_of(*key)).random_raw(size)  # (size,) uint64
    return np.argsort(draws, kind="stable").astype(np.int64)


def uniform(size: int, *key: int | str) -> NDArray[np.float64]:
    """Return `size` numbers from [0, 1), (size,) fp64: the upper 53 bits of raw 64-bit draws."""
    draws = np.random.PCG64(seed_of(*key)).random_raw(size)  # (size,) uint64
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def standard_normal(size: int, *key: int | str) -> NDArray[np.float64]:
    """Return `size` independent standard normal numbers, fp64: by Box and Muller, of two uniform numbers each."""
    radius, angle = uniform(2 * size, *key).reshape(2, size)
    return np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)


@dataclass(frozen=True)
class ClientRandom:
    """The random streams of one client in one round, a separate one for each purpose."""

    seed: int
    round: int
    client: int

    def permutation(self, size: int, *purpose: int | str) -> NDArray[np.int64]:
        """Return a uniform permutation of 0 … size-1, (size,) int64, always the same for one purpose."""
        return permutation(size, self.seed, self.round, self.client, *purpose)

    def seed_for(self, *purpose: int | str) -> int:
        """Return a seed, a non-negative integer below 2⁶³, always the same for one purpose."""
        return seed_of(self.seed, self.round, self.client, *purpose) % 2**63

    def uniform(self, size: int, *purpose: int | str) -> NDArray[np.float64]:
        """Return `size` numbers from [0, 1), (size,) fp64, always the same for one purpose."""
        return uniform(size, self.seed, self.round, self.client, *purpose)


@contextmanager
def torch_seed(device: torch.device, *key: int | str) -> Iterator[None]:
    """Within the context, seed torch's generators of the CPU and of `device` by the key; restore them at the end."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed_of(*key) % 2**63)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed_of(*key) % 2**63)
        yield
