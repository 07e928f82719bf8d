"""Scenes: the truth about an image is exact, and a function of the seed."""

import dataclasses
import math

import numpy as np
import pytest

from infra.scenes import (
    CLASSES,
    COLORS,
    MATERIALS,
    MAX_DEPTH,
    MAX_OBJECTS,
    MIN_SHARE,
    SHAPES,
    SIZES,
    Camera,
    Scene,
    SceneObject,
    render,
    sample_scene,
    scene_caption,
)

SEEDS = (0, 1, 2, 3, 11, 5_000_000, 9_000_000)


def _alone(shape: str, **changes) -> Scene:
    """One solid in the middle of the image, seen from the front and a little above."""
    solid = SceneObject(shape, "red", "large", "rubber", (0.0, 0.0), 0.0, 1.0)
    solid = dataclasses.replace(solid, **changes)
    camera = Camera((0.0, -7.0, 2.5), solid.center, 40.0)
    return dataclasses.replace(sample_scene(0), objects=(solid,), camera=camera)


@pytest.fixture(scope="module", params=SEEDS)
def rendering(request):
    return render(sample_scene(request.param))


def _view_rays(fov: float, size: int) -> np.ndarray:
    """Directions from the camera to pixel centres in camera space (z to the viewer)."""
    line = ((np.arange(size) + 0.5) * 2 / size - 1) * math.tan(math.radians(fov) / 2)
    x, y = np.meshgrid(line, -line)
    return np.stack([x, y, -np.ones_like(x)], axis=-1)


def test_arrays_have_the_documented_types_and_ranges(rendering):
    assert (rendering.rgb.dtype, rendering.rgb.shape) == (np.uint8, (128, 128, 3))
    assert (rendering.depth.dtype, rendering.depth.shape) == (np.float32, (128, 128))
    assert (rendering.normal.dtype, rendering.normal.shape) == (np.float32, (128, 128, 3))
    assert (rendering.classes.dtype, rendering.classes.shape) == (np.uint8, (128, 128))
    assert (rendering.instances.dtype, rendering.instances.shape) == (np.uint8, (128, 128))
    assert rendering.depth.min() > 0
    assert rendering.depth.max() < MAX_DEPTH
    assert np.isfinite(rendering.normal).all()


def test_sphere_depth_is_distance_minus_radius_in_the_middle():
    scene = _alone("sphere")
    rendering = render(scene, 65)
    distance = math.dist(scene.camera.position, scene.objects[0].center)
    assert rendering.depth[32, 32] == pytest.approx(distance - 1.0, abs=1e-4)
    np.testing.assert_allclose(rendering.normal[32, 32], (0, 0, 1), atol=1e-3)


def test_sphere_pixels_lie_on_the_sphere_with_radial_normals():
    scene = _alone("sphere")
    rendering = render(scene, 64)
    mask = rendering.instances == 1
    points = (_view_rays(scene.camera.fov, 64) * rendering.depth[..., None])[mask]
    center = np.array([0, 0, -math.dist(scene.camera.position, scene.objects[0].center)])
    offsets = points - center
    np.testing.assert_allclose(np.linalg.norm(offsets, axis=1), 1.0, atol=1e-4)
    np.testing.assert_allclose(rendering.normal[mask], offsets, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_agree_with_the_depth_they_belong_to(shape):
    scene = _alone(shape, rotation=0.5)
    size = 192
    rendering = render(scene, size)
    points = _view_rays(scene.camera.fov, size) * rendering.depth[..., None]
    right, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    measured = np.cross(down, right)
    measured /= np.linalg.norm(measured, axis=-1, keepdims=True)
    agreement = (measured * rendering.normal[1:-1, 1:-1]).sum(-1)
    inner = rendering.instances[1:-1, 1:-1] == 1
    assert inner.sum() > 1000
    # Differences mislead along silhouettes and edges, and nowhere else.
    assert np.mean(agreement[inner] > 0.99) > 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_solids_stand_on_the_floor_within_their_height_and_width(shape):
    scene = _alone(shape, rotation=0.3)
    rendering = render(scene, 96)
    basis, eye = scene.camera.basis(), np.array(scene.camera.position)
    rays = _view_rays(scene.camera.fov, 96) * (1, 1, -1)
    world = eye + (rays * rendering.depth[..., None]) @ basis
    solid = scene.objects[0]
    inside = world[rendering.instances == 1]
    assert inside[:, 2].min() > -1e-3
    assert solid.height * 0.9 < inside[:, 2].max() < solid.height + 1e-3
    assert np.hypot(inside[:, 0], inside[:, 1]).max() < solid.footprint + 1e-3
    np.testing.assert_allclose(world[rendering.classes == 1][:, 2], 0, atol=1e-3)
    np.testing.assert_allclose(world[rendering.classes == 0][:, 1], scene.wall.distance, atol=1e-3)


def test_normals_are_unit_and_face_the_viewer(rendering):
    normal = rendering.normal
    np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1, atol=1e-5)
    # Along its own ray every seen surface faces the eye; the z component alone may pass zero at
    # a silhouette off the middle, by no more than the ray's own slant.
    assert np.all(normal[..., 2] > -0.51)
    assert np.mean(normal[..., 2] > 0) > 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_no_seen_surface_faces_away_from_its_ray(seed):
    scene = sample_scene(seed)
    rendering = render(scene, 96)
    facing = -(_view_rays(scene.camera.fov, 96) * rendering.normal).sum(-1)
    assert facing.min() > -2e-2


def test_boxes_are_the_extent_of_the_visible_pixels(rendering):
    assert len(rendering.boxes) == len(rendering.objects) == len(rendering.names)
    for number, box in enumerate(rendering.boxes, 1):
        rows, columns = np.nonzero(rendering.instances == number)
        extent = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        np.testing.assert_allclose(box * 128, extent, atol=1e-4)


def test_classes_follow_from_instances(rendering):
    for number, solid in enumerate(rendering.objects, 1):
        mask = rendering.instances == number
        assert set(rendering.classes[mask]) == {CLASSES.index(solid.shape)}
        assert rendering.names[number - 1] == solid.shape
    assert set(np.unique(rendering.classes[rendering.instances == 0])) <= {0, 1}
    assert rendering.instances.max() == len(rendering.objects)


def test_objects_run_from_left_to_right(rendering):
    centers = rendering.boxes[:, 0] + rendering.boxes[:, 2]
    assert np.all(np.diff(centers) >= 0)


def test_scene_and_rendering_are_functions_of_the_seed():
    assert sample_scene(7) == sample_scene(7)
    assert sample_scene(7) != sample_scene(8)
    first, second = render(sample_scene(7)), render(sample_scene(7))
    for name in ("rgb", "depth", "normal", "classes", "instances", "boxes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_scenes_hold_one_to_five_solids_that_are_seen_and_apart():
    for seed in range(40):
        scene = sample_scene(seed)
        rendering = render(scene)
        assert 1 <= len(scene.objects) <= MAX_OBJECTS
        assert set(rendering.objects) == set(scene.objects)
        for number in range(1, len(rendering.objects) + 1):
            assert np.mean(rendering.instances == number) > 0.9 * MIN_SHARE
        for i, one in enumerate(scene.objects):
            for other in scene.objects[:i]:
                apart = math.dist(one.position, other.position)
                assert apart > one.footprint + other.footprint


def test_every_word_occurs():
    solids = [solid for seed in range(120) for solid in sample_scene(seed).objects]
    assert {solid.color for solid in solids} == set(COLORS)
    assert {solid.shape for solid in solids} == set(SHAPES)
    assert {solid.size for solid in solids} == set(SIZES)
    assert {solid.material for solid in solids} == set(MATERIALS)
    floors = {sample_scene(seed).floor.pattern for seed in range(60)}
    assert floors == {"plain", "checker", "stripes"}


def test_metal_looks_unlike_rubber_and_colours_are_their_own():
    rubber, metal = (render(_alone("cylinder", material=name), 64) for name in MATERIALS)
    mask = rubber.instances == 1
    difference = np.abs(rubber.rgb[mask].astype(int) - metal.rgb[mask])
    assert difference.mean() > 8
    red = rubber.rgb[mask].mean(axis=0)
    assert red[0] > 2 * max(red[1], red[2])


def test_solids_cast_shadows_on_the_floor():
    scene = dataclasses.replace(
        _alone("sphere"), floor=dataclasses.replace(sample_scene(0).floor, pattern="plain")
    )
    with_solid, without = render(scene, 64), render(dataclasses.replace(scene, objects=()), 64)
    floor = with_solid.classes == 1
    ratio = with_solid.rgb[floor].mean(axis=1) / without.rgb[floor].mean(axis=1)
    assert ratio.min() < 0.8
    assert np.median(ratio) > 0.9


def test_an_empty_room_renders():
    rendering = render(dataclasses.replace(sample_scene(0), objects=()), 32)
    assert rendering.boxes.shape == (0, 4)
    assert rendering.caption == "an empty room"


def test_truth_does_not_depend_on_the_colours_resolution():
    scene = sample_scene(3)
    assert render(scene, 48).depth.shape == (48, 48)
    assert scene_caption(scene, 48) == render(scene, 48).caption
