"""Formats of text: exact both ways, and tolerant of what a model may write."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_vq import sequences as seq
from tokenizers_vq.sequences.instances import contains
from tokenizers_vq.sequences.metadata import FIELDS, metadata_chunks
from tokenizers_vq.sequences.poses import GROUPS, people_of
from tokenizers_vq.text import FIRST_COORDINATE, UNK, train_text_tokenizer

FORMAT_WORDS = "none human pose global camera shape point polygon"
TEXT = train_text_tokenizer([FORMAT_WORDS] * 3, class_names=["dog", "traffic light"])

unit = st.floats(0, 1, allow_nan=False)
boxes = st.tuples(unit, unit, unit, unit).map(
    lambda b: [min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])]
)
pixels = st.integers(0, 447)
pixel_boxes = st.tuples(pixels, pixels, pixels, pixels).map(
    lambda b: [min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])]
)
codes = st.integers(0, 1023)
colors = st.lists(st.lists(st.integers(0, 255), min_size=3, max_size=3), min_size=1, max_size=7)
metadata = st.dictionaries(st.sampled_from(list(FIELDS)), st.floats(-10, 1e6), max_size=21)
people = st.lists(
    st.fixed_dictionaries({
        "box": boxes,
        "pose": st.lists(codes, min_size=8, max_size=8),
        "global": st.lists(st.floats(-1, 1), min_size=9, max_size=9),
        "camera": st.lists(st.floats(-1, 19), min_size=3, max_size=3),
        "shape": st.lists(st.floats(-3, 3), min_size=10, max_size=10),
    }),
    max_size=3,
)
instances = st.lists(
    st.fixed_dictionaries(
        {"box": pixel_boxes, "codes": st.lists(codes, min_size=16, max_size=16)}
    ),
    max_size=3,
)


def through_ids(line: str) -> str:
    """What comes back from the ids of a text; only blanks may change."""
    decoded = TEXT.decode(TEXT.encode(line))
    assert decoded.split() == line.split()
    assert 1 not in TEXT.encode(line)
    return decoded


@settings(deadline=None)
@given(colors)
def test_palettes_come_back_exactly(palette):
    assert seq.string_to_palette(through_ids(seq.palette_to_string(palette))) == palette


@settings(deadline=None)
@given(metadata)
def test_metadata_read_from_text_is_written_to_the_same_text(values):
    line = seq.metadata_to_string(values)
    back = seq.string_to_metadata(through_ids(line))
    assert list(back) == list(values)
    assert seq.metadata_to_string(back) == line


@pytest.mark.parametrize(
    ("field", "value", "level", "read"),
    [
        ("original_width", 2226, 69, 2208),
        ("caption_n_chars", 4096, 999, 999),
        ("n_humans", -3, 0, 0),
        ("colorfulness", 151, 49, 150),
        ("geometric_complexity", 0.02, 1, 0.75 * 1.5 / 49),
        ("watermark_score", 0.5, 1, 1.0),
        ("aesthetic_score", 5.4, 1, 5.0),
    ],
)
def test_metadata_levels_are_the_released_ones(field, value, level, read):
    line = seq.metadata_to_string({field: value})
    assert line == f"v1={list(FIELDS).index(field)} v0={level}"
    assert seq.string_to_metadata(line)[field] == pytest.approx(read)


@given(st.sampled_from([name for name, field in FIELDS.items() if field.high]), unit)
def test_a_quality_is_read_within_a_level_of_what_was_written(name, share):
    value = FIELDS[name].high * share
    read = seq.string_to_metadata(seq.metadata_to_string({name: value}))[name]
    assert abs(read - value) <= 0.5 / 49 * FIELDS[name].high + 1e-9


def test_metadata_can_be_written_in_any_order_and_unknown_fields_are_refused():
    values = {"n_humans": 1, "entropy": 5}
    assert metadata_chunks(values, ["entropy", "n_humans"]) == ["v1=13 v0=24", "v1=5 v0=1"]
    with pytest.raises(ValueError, match="'humans'; choose from original_width"):
        metadata_chunks({"humans": 1})
    with pytest.raises(ValueError, match="entropy: nan"):
        metadata_chunks({"entropy": float("nan")})


@settings(deadline=None, max_examples=50)
@given(people, st.permutations(range(4)))
def test_poses_come_back_up_to_half_a_step_whatever_the_order(humans, order):
    line = seq.poses_to_string(humans, [order] * len(humans))
    back = seq.string_to_poses(through_ids(line))
    assert seq.poses_to_string(back, [order] * len(back)) == line
    assert [person["pose"] for person in back] == [person["pose"] for person in humans]
    half_step = {"box": 0.5 / 999, "global": 1 / 999, "camera": 10 / 999, "shape": 3 / 999}
    for ours, theirs in zip(back, humans, strict=True):
        for name, tolerance in half_step.items():
            assert np.allclose(ours[name], theirs[name], atol=tolerance + 1e-9, rtol=0)


def test_a_person_takes_39_words_and_nobody_takes_one():
    person = {"box": [0, 0, 1, 1], "pose": [0] * 8, "global": np.eye(3).tolist(),
              "camera": [30.0, 0, 0], "shape": [-9.0] * 10}
    line = seq.poses_to_string([person])
    assert len(line.split()) == 39
    assert "camera v0=999 v0=50 v0=50" in line
    assert "shape v0=0" in line
    assert seq.poses_to_string([]) == "none"
    assert seq.string_to_poses("none") == []


def test_files_of_poses_as_released_become_people():
    data = {"bbox_xyxy": [[1, 2, 3, 4]], "pred_cam": [[5, 6, 7]], "pose_tokenized": [[8] * 8],
            "pred_smpl_params": {"global_orient": [[[0.0] * 3] * 3], "betas": [[0.0] * 10]}}
    [person] = people_of(data)
    assert person["box"] == [1, 2, 3, 4]
    assert {len(person[group]) for group in GROUPS} == {8, 9, 3, 10}
    assert people_of([]) == people_of({}) == []


keypoints = st.lists(
    st.fixed_dictionaries({
        "box": boxes,
        "keypoints": st.lists(
            st.tuples(st.floats(-0.2, 1.2), st.floats(-0.2, 1.2), unit), min_size=17, max_size=17
        ),
    }),
    max_size=3,
)


@settings(deadline=None, max_examples=50)
@given(keypoints)
def test_keypoints_come_back_up_to_half_a_step_and_unseen_ones_as_unseen(humans):
    line = seq.keypoints_to_string(humans)
    back = seq.string_to_keypoints(through_ids(line))
    assert seq.keypoints_to_string(back) == line
    assert len(back) == len(humans)
    for ours, theirs in zip(back, humans, strict=True):
        for (x, y, seen), (u, v, score) in zip(ours["keypoints"], theirs["keypoints"], strict=True):
            assert seen == (score >= 0.3 and 0 <= u <= 1 and 0 <= v <= 1)
            assert not seen or max(abs(x - u), abs(y - v)) <= 0.5 / 999 + 1e-9


def test_a_person_with_missing_or_too_few_keypoints_is_passed_over():
    whole = "human v0=0 v1=0 v2=9 v3=9 pose " + "none " * 16
    assert len(seq.string_to_keypoints(whole + "v0=1 v1=2")) == 1
    assert seq.string_to_keypoints(whole) == seq.string_to_keypoints(whole + "v0=1") == []
    assert seq.keypoints_to_string([]) == "none"
    with pytest.raises(ValueError, match="3 keypoints: a person has 17"):
        seq.keypoints_to_string([{"box": [0, 0, 1, 1], "keypoints": [[0, 0, 1]] * 3}])


@settings(deadline=None, max_examples=50)
@given(instances, st.lists(st.tuples(pixels, pixels), max_size=4))
def test_instances_come_back_exactly_under_the_points_that_hit_them(masks, points):
    given_masks = [
        {**each, "polygon": [(x, y) for x in each["box"][0::2] for y in each["box"][1::2]]}
        for each in masks
    ]
    for each in given_masks:  # corners in order around the box
        a, b, c, d = each["polygon"]
        each["polygon"] = [a, b, d, c]
    back = seq.string_to_sam(through_ids(seq.sam_to_string(given_masks, points)))
    assert [tuple(each["point"]) for each in back] == points
    for found, (x, y) in zip(back, points, strict=True):
        hit = [m for m in masks
               if m["box"][0] <= x <= m["box"][2] and m["box"][1] <= y <= m["box"][3]]
        assert found["instances"] == hit


def test_a_point_is_inside_a_polygon_on_its_border_and_inside_a_mask_on_its_pixels():
    triangle = [(0, 0), (10, 0), (0, 10)]
    assert all(contains(triangle, *point) for point in [(1, 1), (5, 5), (0, 0), (3, 0), (10, 0)])
    assert not any(contains(triangle, *point) for point in [(6, 5), (-1, 0), (11, 0)])
    mask = np.array([[True, False]])
    square = {"box": [4, 7, 6, 8], "codes": [0] * 16, "mask": mask}
    lines = [seq.sam_to_string([square], [point]) for point in [(4, 7), (5, 7), (3, 7), (4, 8)]]
    assert ["none" in line for line in lines] == [False, True, True, True]


@pytest.mark.parametrize(
    "value", ["a dog", {"caption": "a dog"}, ["x", "a dog"], [{"caption": "x"}, "a dog"]]
)
def test_captions_are_found_in_every_released_form(value):
    assert seq.caption_to_string(value, index=3) == "a dog"
    assert seq.string_to_caption("[SOS] a  dog [S_1] [PAD][EOS] cat") == "a dog"


@pytest.mark.parametrize("word", ["[PAD]", "[SOS]", "[EOS]", "[S_0]", "[S_199]"])
def test_a_caption_cannot_hold_a_special_token(word):
    structure = set(range(FIRST_COORDINATE)) - {UNK}
    assert structure & set(TEXT.inner.encode(f"a dog {word}").ids)
    assert not structure & set(TEXT.encode(f"a dog {word} [{word}]"))


@pytest.mark.parametrize("value", [[], {}, 3, [None]])
def test_what_is_no_caption_is_refused(value):
    with pytest.raises(ValueError, match="caption"):
        seq.caption_to_string(value)


def test_objects_that_the_formats_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="8 colours"):
        seq.palette_to_string([[0, 0, 0]] * 8)
    with pytest.raises(ValueError, match="no colour"):
        seq.palette_to_string([[0, 0, 256]])
    with pytest.raises(ValueError, match="code 1024"):
        seq.sam_to_string([{"box": [0, 0, 2, 2], "codes": [1024] * 16,
                            "polygon": [(0, 0), (2, 0), (2, 2)]}], [(1, 1)])


def test_incomplete_parts_of_a_model_s_text_are_passed_over():
    assert seq.string_to_palette("v1=2 v0=1 v0=2 v0=300 v0=4 v0=5") == [[1, 2, 255]]
    assert seq.string_to_palette("v0=1 v0=2 v0=3 [EOS] v0=4 v0=5 v0=6") == [[1, 2, 3]]
    assert seq.string_to_metadata("v1=5 dog v1=5 v0=2 v1=99 v0=1 v1=5 v0=3 v1=6") == {"n_humans": 2}
    people = seq.string_to_poses(
        "v0=1 human v0=1 v1=2 human v0=9 v1=0 v2=1 v3=9 human v0=0 v1=0 v2=999 v3=999 pose v0=1 "
        "camera v0=0 v0=0 v0=999 shape v1=0"
    )
    assert people == [{"box": [0, 0, 1, 1], "camera": pytest.approx([-1, -1, 19])}]
    codes = " ".join(["v1=999"] * 16)
    got = seq.string_to_sam(
        f"polygon v0=0 v1=0 v2=1 v3=1 point v0=3 point v0=1 v1=2 none polygon v0=0 v1=0 v2=1 v3=1 "
        f"{codes} polygon v0=0 v1=0 v2=1 v3=1 v0=3"
    )
    assert got == [{"point": [2, 1], "instances": [{"box": [0, 0, 1, 1], "codes": [1023] * 16}]}]


WORDS = st.sampled_from([
    *FORMAT_WORDS.split(), "v0=1", "v1=3", "v2=5", "v3=9", "v0=999999", "v4=1", "[EOS]", "[S_1]",
    "dog", "[PAD]",
])


@given(st.lists(WORDS, max_size=60))
def test_any_text_is_read_without_an_error(words):
    text = " ".join(words)
    for color in seq.string_to_palette(text):
        assert len(color) == 3
    assert seq.string_to_metadata(text).keys() <= FIELDS.keys()
    for person in seq.string_to_poses(text):
        assert all(0 <= x <= 1 for x in person["box"])
    for human in seq.string_to_keypoints(text):
        assert len(human["keypoints"]) == 17
    for point in seq.string_to_sam(text):
        assert all(len(each["codes"]) == 16 for each in point["instances"])
    assert "[EOS]" not in seq.string_to_caption(text)


def test_qualities_of_metadata_are_written_in_the_ranges_of_the_released_models():
    tops = {name: field.high for name, field in FIELDS.items() if field.high > field.low}
    assert tops == {
        "colorfulness": 150, "brightness": 255, "contrast": 127, "saturation": 255, "entropy": 10,
        "walkability": 1, "objectness": 1, "geometric_complexity": 0.75, "occlusion_score": 0.25,
    }
    assert [FIELDS["aesthetic_score"].level(x) for x in (4.4, 4.5, 5.4, 5.5)] == [0, 1, 1, 2]
    assert [FIELDS["watermark_score"].level(x) for x in (0.49, 0.5)] == [0, 1]
    assert [FIELDS[f"original_{side}"].level(640) for side in ("width", "height")] == [20, 20]
