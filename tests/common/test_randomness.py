"""randomness.py: seeds and noise are functions of their place alone."""

import torch

from common import randomness


def test_seed_of_is_pure_and_spread():
    assert randomness.seed_of(0, "mask", 3) == 4244230323792465521  # on every machine
    assert randomness.seed_of(0, "mask", 3) == randomness.seed_of(0, "mask", 3)
    places = [(seed, use, step) for seed in range(10) for use in ("mask", "order") for step in range(50)]
    seeds = {randomness.seed_of(*place) for place in places}
    assert len(seeds) == len(places) and all(0 <= s < 2**63 for s in seeds)
    assert randomness.seed_of(0, 1) != randomness.seed_of(1, 0)


def test_noise_depends_on_its_place_alone():
    one = randomness.noise(7, 3, 16, 64)
    torch.rand(1000)  # whatever was drawn before
    torch.manual_seed(123)
    assert torch.equal(one, randomness.noise(7, 3, 16, 64))
    assert one.shape == (16, 64) and one.dtype == torch.float32 and 0 <= one.min() and one.max() < 1
    others = [randomness.noise(8, 3, 16, 64), randomness.noise(7, 4, 16, 64),
              randomness.noise(7, 3, 16, 64, use="drop path")]
    assert not any(torch.equal(one, other) for other in others)
    assert len({tuple(row.tolist()) for row in one}) == 16
    state = torch.get_rng_state()
    randomness.noise(0, 0, 4, 4)
    assert torch.equal(state, torch.get_rng_state())
