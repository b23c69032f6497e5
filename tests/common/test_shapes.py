"""shapes.py: an image depends on its number alone, and its class is in its outline and nowhere else."""

import hashlib

import numpy as np

from common.shapes import shapes_batch


def test_shapes_are_a_function_of_seed_and_index():
    numbers = [5, 0, 19_999, 1_000_003, 2_000_001, *range(40, 80)]
    together = shapes_batch(0, numbers)
    for k in (0, 1, 2, 3, 4, 20, 44):
        alone = shapes_batch(0, [numbers[k]])
        for key, value in alone.items():
            assert np.array_equal(value[0], together[key][k]), (key, numbers[k])
    assert np.array_equal(shapes_batch(0, numbers[::-1])["image"], together["image"][::-1])
    assert np.array_equal(shapes_batch(0, numbers, dense=False)["image"], together["image"])
    assert not np.array_equal(shapes_batch(1, numbers)["image"], together["image"])


def test_shapes_are_the_same_bytes_on_every_machine():
    made = shapes_batch(0, range(20))
    assert {key: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16] for key, value in made.items()
            } == GOLDEN


GOLDEN = {"image": "f9805a9c5498d06a",
          "label": "2aaca1e2252f1fc4", "mask": "a4139700bfeecddf", "depth": "69d3ac760214f9a0",
          "keypoints": "2b2763006cf7643d"}


def ridge_accuracy(train, test, y, yt):
    mean, std = train.mean(0), train.std(0) + 1e-9
    a, b = ((np.c_[(x - mean) / std, np.ones(len(x))]) for x in (train, test))
    weights = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ np.eye(10)[y])
    return ((b @ weights).argmax(1) == yt).mean()


def test_shapes_have_no_shortcut():
    """Global statistics do not give the class away; the same classifier on what does, the outline, beats chance."""
    sets = shapes_batch(0, range(2_000)), shapes_batch(0, range(1_000_000, 1_001_000))

    def statistics(made):
        pixels = made["image"].reshape(len(made["image"]), -1, 3)
        bins = np.stack([(pixels >> 5 == b).mean(1) for b in range(8)], 1).reshape(len(pixels), -1)
        return np.c_[pixels.mean(1), pixels.std(1), bins, made["mask"].mean((1, 2))]

    def outline(made):
        return np.c_[made["mask"][:, 20].mean(1), made["mask"][:, 32].mean(1), made["mask"][:, :, 32].mean(1)]

    labels = [made["label"] for made in sets]
    assert ridge_accuracy(*map(statistics, sets), *labels) < 0.14  # 4 standard deviations above 0.1
    assert ridge_accuracy(*map(outline, sets), *labels) > 0.2
    area = [sets[0]["mask"][k::10].mean() for k in range(10)]
    assert max(area) / min(area) < 1.1


def test_shapes_depth_is_in_metres_and_agrees_with_occlusion():
    made = shapes_batch(0, range(50))
    mask, depth = made["mask"], made["depth"]
    assert depth.dtype == np.float32 and 2.4 <= depth.min() and depth.max() <= 20
    for m, z in zip(mask, depth, strict=True):
        assert len(np.unique(z[m])) == 1 and 3 <= z[m][0] <= 4  # one distance a shape, of 1.2 / (0.3 to 0.4)
        ground = z[(z >= 5)]
        assert ground.size and z[0].max() > z[-1].max()  # the top of the picture is far
