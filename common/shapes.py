"""`shapes`, the embedded data: procedural scenes of 64 px, ten classes, made as they are needed; no download, no files.

An upright shape on a textured ground that recedes, half hidden by three bars. Image i is a function of (seed, i), the
same bytes on every machine: only integers and + - * / sqrt floor are used. (A sine may differ in its last bit; so
rotations are rational: cos, sin = (1 - t^2, 2t) / (1 + t^2).)
"""

import functools

import numpy as np

from common.randomness import seed_of

SIDE, KEYS = 64, 64  # pixels; random numbers of an image
STAR = ((0, 1), (0.9511, 0.3090), (-0.9511, 0.3090), (0.5878, -0.8090), (-0.5878, -0.8090))  # normals of its five lines
SHAPES = {  # name -> is (x, y) inside? x to the right, y down; of any size and place, because `stencils` sets both
    "circle": lambda x, y: x * x + y * y < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 1,
    "triangle": lambda x, y: (y < 0.5) & (y > 1.732 * abs(x) - 1),
    "star": lambda x, y: sum((a * x + b * y < 0.4).astype(int) for a, b in STAR) >= 4,
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.35) & (np.maximum(abs(x), abs(y)) < 1),
    "heart": lambda x, y: (x * x + y * y - 1) * (x * x + y * y - 1) * (x * x + y * y - 1) + x * x * (y * y * y) < 0,
    "moon": lambda x, y: (x * x + y * y < 1) & ((x - 0.5) * (x - 0.5) + y * y > 0.6),
    "arrow": lambda x, y: np.where(x < 0, (abs(y) < 0.35) & (x > -1), abs(y) < 0.9 - x),
    "ring": lambda x, y: (x * x + y * y < 1) & (x * x + y * y > 0.3),
    "hourglass": lambda x, y: (abs(y) < 1) & (abs(x) < 0.15 + 0.85 * abs(y)),
}


@functools.cache
def stencils():
    """Coverage, 0 to 128, of the ten shapes with the same centroid and area: int16 (10, 256, 256). 256 entries span 6
    radii, and the centre is entry 0, so that an offset in 1/65536 of that span is an index, negative or not."""
    table = []
    grid = (np.arange(512) - 255.5) / 160  # (512,), -1.6 to 1.6
    fine = (np.arange(512) - 255.5) * (3 / 256)  # (512,), radii
    for inside in SHAPES.values():
        y, x = np.nonzero(inside(grid, grid[:, None]))
        zoom = np.sqrt(len(x) / 160 / 160 / 1.6)  # area: 1.6 radius^2, so that a star's tips stay in the picture
        cx = (int(x.sum()) / len(x) - 255.5) / 160
        cy = (int(y.sum()) / len(y) - 255.5) / 160
        cover = inside(fine * zoom + cx, (fine * zoom + cy)[:, None]).astype(np.int16)  # (512, 512)
        cover = cover[::2] + cover[1::2]  # (256, 512)
        cover = cover[:, ::2] + cover[:, 1::2]  # (256, 256); now a box over neighbours makes edges a pixel wide
        cover = 8 * sum(np.roll(cover, shift, (0, 1)) for shift in ((0, 0), (0, 1), (1, 0), (1, 1)))
        table.append(np.roll(cover, (-128, -128), (0, 1)))
    return np.stack(table)


@functools.cache
def tiles():
    """Five periodic textures, 0 to 128: plain, stripes, checks, dots, zigzag; int16 (5, 32, 32)."""
    y, x = np.mgrid[:32, :32]  # (32, 32)
    u, v = abs(x - 15.5), abs(y - 15.5)  # triangle waves, 0.5 to 15.5
    dots, zigzag = 12 - np.maximum(u, v) - np.minimum(u, v) / 2, abs((y + abs(x - 16)) % 32 - 15.5) - 8
    waves = (0 * u - 8, v - 8, (u - 8) * (v - 8) / 4, dots, zigzag)  # their sign decides; 24 levels a step soften edges
    return np.stack([np.floor(np.clip(w * 24 + 64, 0, 128)).astype(np.int16) for w in waves])


def uniforms(seed, indices):
    """float64 (n, KEYS) in [0, 1): a hash (splitmix64) of (seed, index, key), so that no image depends on others."""
    x = np.asarray(indices, np.uint64)[:, None] * np.uint64(KEYS) + np.arange(KEYS, dtype=np.uint64)  # (n, KEYS)
    x = (x + np.uint64(seed_of(seed, "shapes"))) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) / 2.0**53


def turned(cx, cy, t, scale):
    """Coordinates of all pixels in frames centred at (cx, cy) px, turned by 2 atan(t), `scale` units a px, all (n, 1):
    twice int16 (n, 64, 64), wrapping round."""
    def wrapped(part):
        return np.floor(part).astype(np.int64).astype(np.int16)

    cos, sin = (1 - t * t) / (1 + t * t) * scale, 2 * t / (1 + t * t) * scale
    x, y = np.arange(SIDE) + 0.5 - cx, np.arange(SIDE) + 0.5 - cy  # each (n, 64)
    u = wrapped(cos * x)[:, None, :] + wrapped(sin * y)[:, :, None]  # (n, 64, 64)
    v = wrapped(-sin * x)[:, None, :] + wrapped(cos * y)[:, :, None]  # (n, 64, 64)
    return u, v


def look_up(table, which, u, v, bits):
    """table (K, 2^bits, 2^bits) of image i's `which`, at the leading bits of u and v: int16 (n, 64, 64)."""
    column = np.right_shift(u.view(np.uint16), 16 - bits)
    row = np.right_shift(v.view(np.uint16), 16 - bits)
    place = np.left_shift(row, bits) | column  # (n, 64, 64), uint16
    return table.reshape(-1).take(place + (which << (2 * bits))[:, None, None])


def blend(canvas, colour, cover):
    """In place: canvas (n, 3, 64, 64) -> colour where cover (n, 64, 64) is 128. 255 * 128 just fits int16."""
    change = colour - canvas
    change *= cover[:, None]
    canvas += change >> 7


def scenes(u, labels, dense):
    """(image, mask, depth, keypoints) of a few scenes; u (n, KEYS) their random numbers, taken in turn."""
    numbers = iter(u.T[:, :, None])

    def draw(lo, hi):
        return lo + (hi - lo) * next(numbers)  # (n, 1)

    def colours(lo, hi):
        return np.stack([draw(lo, hi) for _ in range(3)], axis=1).astype(np.int16)[..., None]  # (n, 3, 1, 1)

    def textured(one, two):  # both (n, 3, 1 or 64, 1)
        period = draw(8, 16)
        frame = turned(draw(0, 64), draw(0, 64), draw(-0.4, 0.4), 65536 / period)
        pattern = look_up(tiles(), np.floor(draw(0, 5)).astype(int)[:, 0], *frame, 5)
        canvas = np.repeat(np.repeat(one.astype(np.int16), SIDE // one.shape[2], 2), SIDE, 3)  # (n, 3, 64, 64)
        blend(canvas, two.astype(np.int16), pattern)
        return canvas

    # ground: 5 m away at the bottom, `far` m at the top; the farther, the darker
    far, height = draw(8, 20), (np.arange(SIDE)[::-1] + 0.5) / SIDE
    ground = 1 / ((1 - height) / 5 + height / far)  # (n, 64): inverse distance is linear in the picture
    light = (1 - 0.5 * (ground - 5) / 15)[:, None, :, None]  # (n, 1, 64, 1)
    dark = colours(30, 100)
    image = textured(dark * light, (dark + colours(15, 50)) * light)

    # shape: 2 rotations of +-20 degrees cover 0.1763 = tan 10; 1.2 m over its radius is its distance
    radius = draw(0.30, 0.40)
    z = 1.2 / radius
    cx, cy, t = draw(28, 36), draw(28, 36), draw(-0.1763, 0.1763)
    u, v = turned(cx, cy, t, 65536 / (6 * SIDE * radius))
    cover = look_up(stencils(), labels, u, v, 8)
    bright = colours(150, 255)
    surface = textured(bright, bright * draw(0.65, 0.9)[:, :, None, None])

    # three bars, 0.16 m over their width away, from far to near; the nearer ones cut the shape, which is painted last
    distances = np.sort(np.concatenate([draw(2.4, 4.8) for _ in range(3)], axis=1), axis=1)[:, ::-1, None]  # (n, 3, 1)
    depth = np.repeat(ground.astype(np.float32)[:, :, None], SIDE, 2) if dense else None  # (n, 64, 64)
    for bar_z in distances.swapaxes(0, 1):  # (n, 1)
        across, along = turned(draw(8, 56), draw(8, 56), draw(-1, 1), 128)
        width = np.floor(64 * (0.16 * SIDE / bar_z)).astype(np.int16)[:, :, None]
        length = np.floor(64 * draw(20, 50)).astype(np.int16)[:, :, None]
        bar = np.clip(np.minimum(width - abs(across), length - abs(along)) + np.int16(64), 0, 128)
        blend(image, colours(30, 255), bar)
        np.minimum(cover, 128 - bar, out=cover, where=(bar_z < z)[:, :, None])
        if dense:
            np.copyto(depth, bar_z.astype(np.float32)[:, :, None], where=bar >= 64)
    blend(image, surface, cover)
    mask = cover >= 64  # (n, 64, 64)
    if dense:
        np.copyto(depth, z.astype(np.float32)[:, :, None], where=mask)

    # The tip is a radius above the centre, along the axis that turns with the shape.
    up, right = SIDE * radius * (1 - t * t) / (1 + t * t), SIDE * radius * 2 * t / (1 + t * t)
    keypoints = np.stack([np.hstack([cy, cx]), np.hstack([cy - up, cx + right])], axis=1)  # (n, 2, 2)
    return image, mask, depth, keypoints


def shapes_batch(seed, indices, dense=True):
    """Scenes number `indices` (in any order): image uint8 (n, 64, 64, 3), label int64 (n,) = index % 10, and, if
    `dense`, mask bool (n, 64, 64), the visible pixels of the shape, depth float32 (n, 64, 64) in metres, and keypoints
    float32 (n, 2, 2), (row, column) in pixels of the shape's centre and of its tip, a radius above it along its axis.

    Only the outline knows the class. On means and standard deviations of channels, 3 x 8-bin histograms and the mask's
    area, of 5,000 images, logistic regression is right about 9.8 % of 2,000 others, 20 nearest neighbours 10.4 %."""
    indices = np.asarray(indices, np.int64)
    labels, n = indices % len(SHAPES), len(indices)
    image = np.empty((n, 3, SIDE, SIDE), np.uint8)
    mask, depth = np.empty((n, SIDE, SIDE), bool), np.empty((n, SIDE, SIDE), np.float32)
    keypoints = np.empty((n, 2, 2), np.float32)
    for i in range(0, n, 32):  # few enough for the processor's cache
        part = slice(i, i + 32)
        made = scenes(uniforms(seed, indices[part]), labels[part], dense)
        image[part] = made[0]
        if dense:
            mask[part], depth[part], keypoints[part] = made[1:]
    out = {"image": image.transpose(0, 2, 3, 1), "label": labels}  # (n, 64, 64, 3)
    return out | {"mask": mask, "depth": depth, "keypoints": keypoints} if dense else out
