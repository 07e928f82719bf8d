"""The ray-caster: a scene in, an image and the exact truth about it out.

One geometry pass gives depth, normals and instances for every pixel centre; colours are then
refined with four rays in those pixels alone where neighbours differ, which costs a third of
what supersampling the whole image would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from infra.scenes.geometry import Array, column, dot, intersect, normals, unit
from infra.scenes.language import caption
from infra.scenes.world import CLASSES, COLORS, Camera, Scene, SceneObject

WALL, FLOOR, FIRST_SOLID = 0, 1, 2

_EDGE = 14  # levels of 255 between neighbours from which a pixel gets four rays
_QUARTERS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))


@dataclass(frozen=True)
class Rendering:
    """An image and the truth about it; S is the image's side in pixels.

    Attributes:
        rgb: uint8 [S, S, 3].
        depth: float32 [S, S], metres along the optical axis, in (0, MAX_DEPTH).
        normal: float32 [S, S, 3], unit vectors in camera space: x right, y up, z to the viewer.
        classes: uint8 [S, S], indices into `CLASSES`.
        instances: uint8 [S, S]; 0 is none, k is `objects[k - 1]`.
        boxes: float32 [n, 4], xmin, ymin, xmax, ymax of the visible pixels in 0..1.
        names: Class name of each box.
        objects: The visible solids from left to right by the centre of their boxes.
        caption: A sentence that names them all.
    """

    rgb: NDArray[np.uint8]
    depth: Array
    normal: Array
    classes: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    boxes: Array
    names: list[str]
    objects: tuple[SceneObject, ...]
    caption: str


@dataclass
class _Hits:
    """What each ray meets: depth [N], surface uint8 [N] (0 wall, 1 floor, 2.. solids)."""

    u: Array
    v: Array
    direction: Array
    depth: Array
    surface: NDArray[np.uint8]


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[Array, Array]:
    """Pixel centres in -1..1, x to the right and y up, each float32 [size * size]."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    x, y = np.meshgrid(line, -line)
    return x.ravel(), y.ravel()


def screen_bound(center: Array, radius: float) -> tuple[float, float, float, float]:
    """Limits (u low, u high, v low, v high) of a ball given in camera axes, at depth 1."""
    limits = []
    for across in (float(center[0]), float(center[1])):
        away = float(center[2])
        angle = math.atan2(across, away)
        spread = math.asin(min(1.0, radius / math.hypot(across, away)))
        limits += [math.tan(angle - spread), math.tan(angle + spread)]
    return limits[0], limits[1], limits[2], limits[3]


def cast(scene: Scene, x: Array, y: Array) -> _Hits:
    """Send rays through image points given in -1..1 (x right, y up), each [N]."""
    camera = scene.camera
    basis, eye = camera.basis(), column(camera.position)
    u, v = x * np.float32(camera.half), y * np.float32(camera.half)
    # Forward has length 1 along the optical axis, so the ray's parameter is the depth itself.
    direction = basis[0][:, None] * u + basis[1][:, None] * v + basis[2][:, None]
    depth = (np.float32(scene.wall.distance) - eye[1]) / direction[1]
    ground = -eye[2] / np.minimum(direction[2], np.float32(-1e-6))
    surface = (ground < depth).astype(np.uint8)
    depth = np.minimum(depth, ground)
    for number, solid in enumerate(scene.objects):
        center = basis @ (np.asarray(solid.center, np.float32) - eye[:, 0])
        left, right, low, high = screen_bound(center, solid.bound)
        near = np.flatnonzero((u >= left) & (u <= right) & (v >= low) & (v <= high))
        t = intersect(solid, eye, direction[:, near])
        hit = t < depth[near]
        depth[near[hit]] = t[hit]
        surface[near[hit]] = FIRST_SOLID + number
    return _Hits(u, v, direction, depth, surface)


def _world_normals(scene: Scene, hits: _Hits, points: Array) -> Array:
    normal = np.zeros_like(points)
    normal[2] = hits.surface == FLOOR
    normal[1] = -(hits.surface == WALL).astype(np.float32)
    for number, solid in enumerate(scene.objects):
        where = np.flatnonzero(hits.surface == FIRST_SOLID + number)
        normal[:, where] = normals(solid, points[:, where])
    return normal


def _linear(color: tuple[int, int, int]) -> Array:
    """RGB levels as light, [3, 1]: the square stands in for the display's gamma."""
    return column(color) ** 2 / np.float32(255**2)


def _floor_color(scene: Scene, x: Array, y: Array) -> Array:
    floor = scene.floor
    first, second = (_linear(color) for color in floor.colors)
    if floor.pattern == "plain":
        return np.broadcast_to(first, (3, x.size))
    c = np.float32(math.cos(floor.rotation) / floor.period)
    s = np.float32(math.sin(floor.rotation) / floor.period)
    odd = np.floor(c * x + s * y)
    if floor.pattern == "checker":
        odd = odd + np.floor(c * y - s * x)
    odd = odd - 2 * np.floor(odd / 2)
    return first + odd * (second - first)


def _light_reaching(scene: Scene, hits: _Hits, points: Array) -> tuple[Array, Array]:
    """Shares of the far light and of the even light that reach each point, [N] each."""
    toward = column(scene.light.direction)
    direct = np.ones(points.shape[1], np.float32)
    even = np.ones(points.shape[1], np.float32)
    for number, solid in enumerate(scene.objects):
        # Solids are convex: none shades itself beyond what its normals say already.
        other = hits.surface != FIRST_SOLID + number
        away = column(solid.center) - points
        along, square = dot(away, toward), dot(away, away)
        even *= 1 - np.where(other, np.float32(0.45 * solid.bound**2), 0) / (square + 0.2)
        maybe = (along > 0) & (square - along * along < np.float32(solid.bound**2)) & other
        near = np.flatnonzero(maybe & (direct > 0))
        direct[near] *= ~np.isfinite(intersect(solid, points[:, near], toward))
    return direct, even


def _environment(scene: Scene, points: Array, direction: Array) -> Array:
    """Light that a mirror at `points` would see in `direction`, [3, N] both."""
    down = direction[2] < -0.02
    reach = np.where(down, -points[2] / np.minimum(direction[2], np.float32(-0.02)), 0)
    reach = np.minimum(reach, 12)
    ground = _floor_color(
        scene, points[0] + reach * direction[0], points[1] + reach * direction[1]
    )
    height = np.clip(direction[2], 0, 1)
    sky = _linear(scene.wall.color) * (1 - height) * np.float32(0.8) + height * np.float32(0.95)
    return np.where(down, ground * np.float32(0.8), sky)


def _metal(scene: Scene, base: Array, view: Array, normal: Array, points: Array) -> Array:
    """Mirror image tinted by the metal's colour, and hard highlights, [3, N]."""
    view = unit(view)
    mirrored = view - 2 * dot(view, normal) * normal
    glance = (1 + np.minimum(dot(view, normal), 0)) ** 4
    tint = base * (1 - np.float32(0.5) * glance) + np.float32(0.4) * glance
    sun = scene.light.direction
    shine = np.float32(1.2) * np.maximum(dot(mirrored, column(sun)), 0) ** 40
    # A tall lamp at the light's side draws a streak on upright faces, which would else mirror
    # nothing but the floor and pass for rubber.
    flat = np.hypot(mirrored[0], mirrored[1]) * np.float32(math.hypot(sun[0], sun[1]))
    aligned = (mirrored[0] * np.float32(sun[0]) + mirrored[1] * np.float32(sun[1])) / flat
    streak = np.float32(0.55) * np.maximum(aligned, 0) ** 24 * (1 - np.abs(normal[2]))
    return tint * _environment(scene, points, mirrored) + (tint + np.float32(0.3)) * streak + shine


def _colors(scene: Scene, hits: _Hits, points: Array, normal: Array) -> NDArray[np.uint8]:
    """Displayed colours of the rays' hits, uint8 [3, N]."""
    light = scene.light
    direct, even = _light_reaching(scene, hits, points)
    facing = np.maximum(dot(normal, column(light.direction)), 0)
    diffuse = light.intensity * facing * direct
    ambient = even * (light.ambient * (np.float32(0.75) + np.float32(0.25) * normal[2]))
    base = np.empty_like(points)
    base[:] = _linear(scene.wall.color)
    where = np.flatnonzero(hits.surface == FLOOR)
    base[:, where] = _floor_color(scene, points[0, where], points[1, where])
    extra: list[tuple[NDArray[np.intp], Array]] = []
    for number, solid in enumerate(scene.objects):
        where = np.flatnonzero(hits.surface == FIRST_SOLID + number)
        base[:, where] = _linear(COLORS[solid.color])
        if solid.material == "metal":
            seen = hits.direction[:, where], normal[:, where], points[:, where]
            shine = _metal(scene, base[:, where], *seen)
            base[:, where] *= np.float32(0.35)
            extra.append((where, shine * (np.float32(0.35) + np.float32(0.65) * direct[where])))
    out = base * (diffuse + ambient)
    for where, shine in extra:
        out[:, where] += shine
    return (np.sqrt(np.minimum(out, 1)) * 255 + np.float32(0.5)).astype(np.uint8)


def _points(scene: Scene, hits: _Hits) -> Array:
    return column(scene.camera.position) + hits.depth * hits.direction


def _smooth_edges(scene: Scene, rgb: NDArray[np.uint8], size: int) -> None:
    """Replace the colours of pixels that differ from a neighbour by means of four, in place."""
    levels = rgb.reshape(3, size, size).astype(np.int16)
    edge = np.zeros((size, size), bool)
    across = np.abs(np.diff(levels, axis=2)).max(axis=0) > _EDGE
    down = np.abs(np.diff(levels, axis=1)).max(axis=0) > _EDGE
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    where = np.flatnonzero(edge)
    if not where.size:
        return
    x, y = grid(size)
    step = np.float32(2 / size)
    offsets = np.asarray(_QUARTERS, np.float32) * step
    xs = (x[where] + offsets[:, :1]).ravel()
    ys = (y[where] + offsets[:, 1:]).ravel()
    hits = cast(scene, xs, ys)
    points = _points(scene, hits)
    fine = _colors(scene, hits, points, _world_normals(scene, hits, points))
    mean = fine.reshape(3, len(_QUARTERS), where.size).mean(axis=1, dtype=np.float32)
    rgb[:, where] = (mean + np.float32(0.5)).astype(np.uint8)


def _left_to_right(surface: NDArray[np.uint8], count: int) -> tuple[list[int], Array]:
    """Numbers of the solids that are seen, and their boxes in 0..1 (float32 [n, 4]).

    Ordered by the centres of the boxes.
    """
    found: dict[int, tuple[int, int, int, int]] = {}
    for number in range(count):
        mask = surface == FIRST_SOLID + number
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if columns.size:
            found[number] = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    order = sorted(found, key=lambda number: (found[number][0] + found[number][2], number))
    boxes = np.array([found[number] for number in order], np.float32).reshape(-1, 4)
    return order, boxes / np.float32(surface.shape[0])


def scene_caption(scene: Scene, size: int = 128) -> str:
    """The caption that `render` would give, at a third of its cost.

    Args:
        scene: The scene.
        size: Side of the image, pixels; what is seen first from the left may depend on it.
    """
    with np.errstate(all="ignore"):
        surface = cast(scene, *grid(size)).surface.reshape(size, size)
    order, _ = _left_to_right(surface, len(scene.objects))
    return caption([scene.objects[number] for number in order], scene.camera)


def render(scene: Scene, size: int = 128) -> Rendering:
    """Draw a scene.

    Args:
        scene: What to draw.
        size: Side of the image, pixels.

    Returns:
        The image and its truth. Depth, normals, classes and instances belong to the pixels'
        centres; only colours are averaged over a pixel.
    """
    with np.errstate(all="ignore"):  # rays that miss divide by zero and lose every comparison
        hits = cast(scene, *grid(size))
        points = _points(scene, hits)
        normal = _world_normals(scene, hits, points)
        rgb = _colors(scene, hits, points, normal)
        _smooth_edges(scene, rgb, size)
    surface = hits.surface.reshape(size, size)
    order, boxes = _left_to_right(surface, len(scene.objects))
    instance_of = np.zeros(FIRST_SOLID + len(scene.objects), np.uint8)
    class_of = np.arange(FIRST_SOLID + len(scene.objects), dtype=np.uint8)
    for place, number in enumerate(order):
        instance_of[FIRST_SOLID + number] = place + 1
        class_of[FIRST_SOLID + number] = CLASSES.index(scene.objects[number].shape)
    objects = tuple(scene.objects[number] for number in order)
    return Rendering(
        rgb=np.ascontiguousarray(rgb.reshape(3, size, size).transpose(1, 2, 0)),
        depth=hits.depth.reshape(size, size),
        normal=_camera_normals(scene.camera, normal, size),
        classes=class_of[surface],
        instances=instance_of[surface],
        boxes=boxes,
        names=[solid.shape for solid in objects],
        objects=objects,
        caption=caption(objects, scene.camera),
    )


def _camera_normals(camera: Camera, normal: Array, size: int) -> Array:
    basis = camera.basis()
    basis[2] *= -1  # camera space looks down its negative z
    turned = normal.T @ basis.T
    return turned.reshape(size, size, 3)
