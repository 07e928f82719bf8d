"""The embedded world: scenes of solids in a room, with exact truth, words and a web server.

A scene is a pure function of its seed. By convention demos and ingestion count up from
`DEMO_SEED`, networks that label images train on scenes from `TEACHER_SEED` on, and evaluation
uses scenes from `EVAL_SEED` on, so that no part has seen what another is measured with.
"""

from infra.scenes.language import caption, caption_score, describe, parse_caption
from infra.scenes.raycast import Rendering, render, scene_caption
from infra.scenes.sampling import MAX_OBJECTS, MIN_SHARE, sample_scene
from infra.scenes.world import (
    CLASSES,
    COLORS,
    MATERIALS,
    MAX_DEPTH,
    SHAPES,
    SIZES,
    Camera,
    Floor,
    Light,
    Scene,
    SceneObject,
    Wall,
)

DEMO_SEED = 0
TEACHER_SEED = 5_000_000
EVAL_SEED = 9_000_000

__all__ = [
    "CLASSES",
    "COLORS",
    "DEMO_SEED",
    "EVAL_SEED",
    "MATERIALS",
    "MAX_DEPTH",
    "MAX_OBJECTS",
    "MIN_SHARE",
    "SHAPES",
    "SIZES",
    "TEACHER_SEED",
    "Camera",
    "Floor",
    "Light",
    "Rendering",
    "Scene",
    "SceneObject",
    "Wall",
    "caption",
    "caption_score",
    "describe",
    "parse_caption",
    "render",
    "sample_scene",
    "scene_caption",
]
