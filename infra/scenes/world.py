"""What a scene is made of: words, solids, camera, light, room.

World frame: metres, right-handed, z up, the floor is z = 0 and the back wall is a plane of
constant y. The camera stands at negative y and looks towards the wall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLASSES = ("background", "floor", "sphere", "cube", "cylinder", "cone")
SHAPES = CLASSES[2:]
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
COLORS: dict[str, tuple[int, int, int]] = {
    "gray": (120, 120, 122),
    "red": (205, 38, 38),
    "blue": (38, 76, 220),
    "green": (30, 140, 40),
    "brown": (126, 72, 26),
    "purple": (140, 45, 200),
    "cyan": (40, 205, 210),
    "yellow": (250, 225, 45),
}
MAX_DEPTH = 20.0
"""Metres; the room ends before it, so every depth lies in (0, MAX_DEPTH)."""

Vector = tuple[float, float, float]

# Half width on the ground and height of each solid, as shares of its radius: chosen so that
# solids of one size cover about the same area on screen whatever their shape.
_PROPORTIONS = {
    "sphere": (1.0, 2.0),
    "cube": (0.78, 1.56),
    "cylinder": (0.80, 1.70),
    "cone": (0.95, 2.10),
}


@dataclass(frozen=True)
class SceneObject:
    """A solid standing on the floor.

    Attributes:
        shape: One of `SHAPES`.
        color: A key of `COLORS`.
        size: One of `SIZES`.
        material: One of `MATERIALS`.
        position: Ground point (x, y) under its centre, metres.
        rotation: About the vertical, radians.
        radius: Scale of the solid, metres.
    """

    shape: str
    color: str
    size: str
    material: str
    position: tuple[float, float]
    rotation: float
    radius: float

    @property
    def half_width(self) -> float:
        """Ground radius (half the edge, for a cube), metres."""
        return _PROPORTIONS[self.shape][0] * self.radius

    @property
    def height(self) -> float:
        """Metres."""
        return _PROPORTIONS[self.shape][1] * self.radius

    @property
    def center(self) -> Vector:
        """Middle of the solid in the world, metres."""
        return (*self.position, self.height / 2)

    @property
    def footprint(self) -> float:
        """Radius of the circle on the ground that holds the solid, metres."""
        return self.half_width * (math.sqrt(2) if self.shape == "cube" else 1.0)

    @property
    def bound(self) -> float:
        """Radius of a ball about `center` that holds the solid, metres."""
        if self.shape == "sphere":
            return self.radius
        return math.hypot(self.footprint, self.height / 2)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with a square image.

    Attributes:
        position: World point, metres.
        target: World point in the middle of the image, metres.
        fov: Full angle of view, degrees.
    """

    position: Vector
    target: Vector
    fov: float

    @property
    def half(self) -> float:
        """Half the image's width at depth 1 (the tangent of half the angle of view)."""
        return math.tan(math.radians(self.fov) / 2)

    def basis(self) -> NDArray[np.float32]:
        """Rows are the camera's right, up and forward in the world, float32 [3, 3]."""
        forward = np.subtract(self.target, self.position)
        forward /= np.linalg.norm(forward)
        right = np.array([forward[1], -forward[0], 0.0])
        right /= np.linalg.norm(right)
        up = np.cross(right, forward)
        return np.stack([right, up, forward]).astype(np.float32)


@dataclass(frozen=True)
class Light:
    """A far light and the even light of the room.

    Attributes:
        direction: Unit vector towards the light.
        intensity: Of the far light, linear.
        ambient: Of the even light, linear.
    """

    direction: Vector
    intensity: float
    ambient: float


@dataclass(frozen=True)
class Floor:
    """The floor's pattern.

    Attributes:
        pattern: "plain", "checker" or "stripes".
        colors: The two RGB tones, 0..255 (a plain floor shows the first).
        period: Width of a tile or stripe, metres.
        rotation: Of the pattern, radians.
    """

    pattern: str
    colors: tuple[tuple[int, int, int], tuple[int, int, int]]
    period: float
    rotation: float


@dataclass(frozen=True)
class Wall:
    """The back wall: the plane y = `distance` (metres), of one RGB tone in 0..255."""

    color: tuple[int, int, int]
    distance: float


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs; a pure function of `seed`."""

    seed: int
    objects: tuple[SceneObject, ...]
    camera: Camera
    light: Light
    floor: Floor
    wall: Wall
