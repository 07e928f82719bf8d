"""Scenes from seeds."""

from __future__ import annotations

import math

import numpy as np

from infra.scenes.raycast import FIRST_SOLID, cast, grid, screen_bound
from infra.scenes.world import (
    COLORS,
    MATERIALS,
    SHAPES,
    SIZES,
    Camera,
    Floor,
    Light,
    Scene,
    SceneObject,
    Wall,
)

MAX_OBJECTS = 5
MIN_SHARE = 0.012
"""Least share of the image's pixels by which a solid must be seen."""

_RADIUS = {"small": 0.50, "large": 0.92}
_GAP = 0.12  # metres between the footprints of two solids
_REACH = 3.1  # metres from the room's middle
_MARGIN = 0.97  # solids stay inside of this share of the half image
_PROBE = 56  # pixels; enough to weigh a share of 1.2 %, and a fraction of a rendering's cost
_PLACEMENTS = 24

# Pale or dusky tones, so that no solid's colour drowns in its surroundings.
_TONES = (
    (214, 208, 198), (190, 196, 204), (172, 160, 142), (150, 160, 150), (208, 190, 176),
    (164, 172, 190), (132, 128, 124), (226, 220, 206), (186, 170, 180), (176, 190, 176),
    (108, 112, 122), (146, 126, 106),
)  # fmt: skip


def _camera(rng: np.random.Generator) -> Camera:
    azimuth = math.radians(rng.uniform(-24, 24))
    away = rng.uniform(6.6, 7.8)
    height = rng.uniform(3.4, 4.8)
    target = (rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), 0.45)
    position = (away * math.sin(azimuth), -away * math.cos(azimuth), height)
    return Camera(position, target, rng.uniform(40, 45))


def _light(rng: np.random.Generator, camera: Camera) -> Light:
    # From the camera's side of the room, or solids would show their dark faces alone.
    front = math.atan2(camera.position[1], camera.position[0])
    azimuth = front + math.radians(rng.choice((-1, 1)) * rng.uniform(15, 75))
    elevation = math.radians(rng.uniform(38, 66))
    flat = math.cos(elevation)
    direction = (flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation))
    return Light(direction, rng.uniform(0.65, 0.95), rng.uniform(0.30, 0.42))


def _floor(rng: np.random.Generator) -> Floor:
    pattern = str(rng.choice(("plain", "checker", "stripes"), p=(0.5, 0.3, 0.2)))
    first, second = rng.choice(len(_TONES), 2, replace=False)
    turn = rng.uniform(0, math.pi / 2)
    return Floor(pattern, (_TONES[first], _TONES[second]), rng.uniform(0.8, 1.6), turn)


def _fits(solid: SceneObject, others: list[SceneObject], camera: Camera, wall: Wall) -> bool:
    x, y = solid.position
    if math.hypot(x, y) > _REACH or y + solid.footprint > wall.distance - _GAP:
        return False
    for other in others:
        apart = math.hypot(x - other.position[0], y - other.position[1])
        if apart < solid.footprint + other.footprint + _GAP:
            return False
    center = camera.basis() @ np.subtract(solid.center, camera.position).astype(np.float32)
    limit = _MARGIN * camera.half
    return max(map(abs, screen_bound(center, solid.radius))) < limit


def _place(
    rng: np.random.Generator, others: list[SceneObject], camera: Camera, wall: Wall
) -> SceneObject | None:
    """A random solid where there is room for it, or None if there seems to be none."""
    size = SIZES[rng.integers(2)]
    names = list(COLORS)
    shape, color = SHAPES[rng.integers(len(SHAPES))], names[rng.integers(len(names))]
    material = MATERIALS[rng.integers(2)]
    radius = _RADIUS[size] * rng.uniform(0.95, 1.05)
    rotation = rng.uniform(0, math.pi / 2)
    for x, y in rng.uniform(-_REACH, _REACH, (_PLACEMENTS, 2)).tolist():
        solid = SceneObject(shape, color, size, material, (x, y), rotation, radius)
        if _fits(solid, others, camera, wall):
            return solid
    return None


def _drop_hidden(scene: Scene) -> Scene:
    """Remove solids that are hardly seen; the ones left can only gain by it."""
    with np.errstate(all="ignore"):
        surface = cast(scene, *grid(_PROBE)).surface
    pixels = np.bincount(surface, minlength=FIRST_SOLID + len(scene.objects))[FIRST_SOLID:]
    enough = pixels >= math.ceil(MIN_SHARE * 1.05 * _PROBE**2)
    kept = tuple(s for s, keep in zip(scene.objects, enough, strict=True) if keep)
    return Scene(scene.seed, kept, scene.camera, scene.light, scene.floor, scene.wall)


def sample_scene(seed: int) -> Scene:
    """Make a scene of one to five solids.

    Args:
        seed: Any non-negative integer; the scene is a pure function of it.

    Returns:
        A scene in which no two solids overlap and each is seen on at least about 1.2 % of
        the pixels.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    while True:
        camera = _camera(rng)
        wall = Wall(_TONES[rng.integers(len(_TONES))], rng.uniform(3.4, 4.4))
        light, floor = _light(rng, camera), _floor(rng)
        objects: list[SceneObject] = []
        for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
            solid = _place(rng, objects, camera, wall)
            if solid is not None:
                objects.append(solid)
        scene = _drop_hidden(Scene(seed, tuple(objects), camera, light, floor, wall))
        if scene.objects:
            return scene
