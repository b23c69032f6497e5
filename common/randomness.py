"""Random numbers as a function of where they are used: never of how many were drawn before, or by which process."""

import hashlib

import torch


def seed_of(*place):
    """A 63-bit seed for a place such as (seed, "mask", step). Hashed, so that (seed 0, epoch 1) is not (seed 1,
    epoch 0)."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "little") >> 1


def noise(seed, step, *shape, use="mask"):
    """Uniform noise in [0, 1) for the whole global batch of a step: float32 of `shape`, (B, N) for masks. Every process
    draws it on the CPU and picks what belongs to its images, and so gets what one process would have got."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed_of(seed, use, step)))
