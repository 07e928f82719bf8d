"""Rays against solids: where they meet, and which way the surface faces.

Vectors are float32 [3, N] (one row per axis), so that each formula is a few operations on
contiguous memory. An origin or direction may be [3, 1] where all rays share it.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from numpy.typing import NDArray

from infra.scenes.world import SceneObject

Array = NDArray[np.float32]

_INF = np.float32(np.inf)


def dot(a: Array, b: Array) -> Array:
    """Inner product along the first axis, [N]."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(vectors: Array) -> Array:
    """Vectors scaled to length 1, [3, N]."""
    return cast(Array, vectors / np.sqrt(dot(vectors, vectors)))


def column(vector: tuple[float, float, float]) -> Array:
    """A single vector as float32 [3, 1]."""
    return np.asarray(vector, np.float32).reshape(3, 1)


def to_local(solid: SceneObject, vectors: Array) -> Array:
    """Directions of the world in the solid's own axes (a turn about the vertical), [3, N]."""
    if solid.shape != "cube":
        return vectors
    c, s = np.float32(math.cos(solid.rotation)), np.float32(math.sin(solid.rotation))
    x, y, z = vectors
    return np.stack([c * x + s * y, c * y - s * x, z])


def _sphere(solid: SceneObject, o: Array, d: Array) -> Array:
    a, b = dot(d, d), dot(o, d)
    inside = b * b - a * (dot(o, o) - np.float32(solid.radius**2))
    return np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, _INF)


def _between(near: Array, far: Array) -> Array:
    return np.where((near < far) & (far > 0), near, _INF)


def _slab(o: Array, d: Array, half: float) -> tuple[Array, Array]:
    """Entry to and exit from the layer |x| <= half along one axis, both [N]."""
    inverse = np.float32(1) / np.where(np.abs(d) < 1e-7, np.float32(1e-7), d)
    middle, reach = -o * inverse, np.float32(half) * np.abs(inverse)
    return cast(Array, middle - reach), cast(Array, middle + reach)


def _cube(solid: SceneObject, o: Array, d: Array) -> Array:
    o, d = to_local(solid, o), to_local(solid, d)
    near, far = _slab(o[0], d[0], solid.half_width)
    for axis in (1, 2):
        enter, leave = _slab(o[axis], d[axis], solid.half_width)
        near, far = np.maximum(near, enter), np.minimum(far, leave)
    return _between(near, far)


def _cylinder(solid: SceneObject, o: Array, d: Array) -> Array:
    a = np.maximum(d[0] * d[0] + d[1] * d[1], np.float32(1e-9))
    b = o[0] * d[0] + o[1] * d[1]
    inside = b * b - a * (o[0] * o[0] + o[1] * o[1] - np.float32(solid.half_width**2))
    root = np.sqrt(np.maximum(inside, 0))
    enter, leave = _slab(o[2], d[2], solid.height / 2)
    near, far = np.maximum((-b - root) / a, enter), np.minimum((root - b) / a, leave)
    return np.where(inside > 0, _between(near, far), _INF)


def _cone(solid: SceneObject, o: Array, d: Array) -> Array:
    # The base lies on the floor, where no ray comes from below: only the mantle can be met.
    slope2 = np.float32((solid.half_width / solid.height) ** 2)
    below = np.float32(solid.height / 2) - o[2]
    a = d[0] * d[0] + d[1] * d[1] - slope2 * d[2] * d[2]
    a = np.where(np.abs(a) < 1e-7, np.float32(1e-7), a)
    b = o[0] * d[0] + o[1] * d[1] + slope2 * below * d[2]
    inside = b * b - a * (o[0] * o[0] + o[1] * o[1] - slope2 * below * below)
    root = np.sqrt(np.maximum(inside, 0))
    best = np.full(inside.shape, _INF)
    for t in ((-b - root) / a, (root - b) / a):
        # The mirrored upper cone and what lies under the floor are cut off by height.
        hit = (inside > 0) & (t > 0) & (np.abs(o[2] + t * d[2]) <= solid.height / 2)
        best = np.where(hit & (t < best), t, best)
    return best


_SHAPES = {"sphere": _sphere, "cube": _cube, "cylinder": _cylinder, "cone": _cone}


def intersect(solid: SceneObject, origin: Array, direction: Array) -> Array:
    """First meeting of rays with a solid.

    Args:
        solid: The solid.
        origin: World points, [3, N] or [3, 1], outside of the solid and above the floor.
        direction: World directions of any length, [3, N] or [3, 1].

    Returns:
        Multiples of `direction`, [N]; inf where the ray misses. Negative values occur only
        for rays that start beyond the entry.
    """
    return _SHAPES[solid.shape](solid, origin - column(solid.center), direction)


def normals(solid: SceneObject, points: Array) -> Array:
    """Outward unit normals at points of a solid's surface.

    Args:
        solid: The solid.
        points: World points on its surface, [3, N].

    Returns:
        World unit vectors, [3, N].
    """
    p = points - column(solid.center)
    if solid.shape == "sphere":
        return unit(p)
    if solid.shape == "cube":
        return _cube_normals(solid, p)
    x, y, z = p
    radial = np.maximum(np.hypot(x, y), np.float32(1e-6))
    if solid.shape == "cone":
        length = math.hypot(solid.height, solid.half_width)
        out = np.float32(solid.height / length) / radial
        return np.stack([x * out, y * out, np.full_like(x, solid.half_width / length)])
    # On the lid the height is reached first, on the mantle the radius.
    lid = z / np.float32(solid.height / 2) > radial / np.float32(solid.half_width)
    out = np.where(lid, np.float32(0), 1 / radial)
    return np.stack([x * out, y * out, lid.astype(np.float32)])


def _cube_normals(solid: SceneObject, p: Array) -> Array:
    local = to_local(solid, p)
    axis = np.abs(local).argmax(axis=0)
    index = np.arange(p.shape[1])
    sign = np.sign(local[axis, index])
    face = np.zeros_like(local)
    face[axis, index] = sign
    c, s = np.float32(math.cos(solid.rotation)), np.float32(math.sin(solid.rotation))
    x, y, z = face
    return np.stack([c * x - s * y, s * x + c * y, z])
