"""Modalities at 224 and 448 pixels: labels are cut to either, grids of tokens grow with them."""

import numpy as np
import pytest
import torch

from models import modalities
from models.crops import CropPolicy, crop_box
from models.fourm.catalogue import released_spec
from tasks.tokenizer_recipes import tokenizer_recipe
from tests.models.test_text_forms import MANY, form_of, page_of
from tests.tasks.every_modality import value_of
from tokenizers_vq.codec import pack_value
from tokenizers_vq.ordered import build_network
from tokenizers_vq.tokenizer import Tokenizer

TINY = {"width": 16, "encoder_depth": 1, "decoder_depth": 1}
PICTURES = ("rgb", "depth", "normal", "semseg", "canny_edge", "sam_edge")
GRIDS = ("clip", "dinov2", "imagebind")
WHOLE = ("dinov2_global", "imagebind_global")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def cropped(name: str, size: int) -> np.ndarray:
    box = crop_box(CropPolicy(num_crops=2, size=size), "000001", 1, 1.5)
    return modalities.get(name).crop(value_of(name, 0), box, size)


def tokenizer(name: str, size: int, values: np.ndarray) -> Tokenizer:
    torch.manual_seed(0)
    recipe = tokenizer_recipe(name, size=size, num_classes=4 * (name == "semseg"), **TINY)
    return Tokenizer(name, build_network(recipe.resolved(values)), recipe.codec(values), "fp32")


@pytest.mark.parametrize(("size", "tokens"), [(224, 196), (448, 784)])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_and_maps_are_cut_and_tokenized_at_either_size(name, size, tokens) -> None:
    value = cropped(name, size)
    assert value.shape[:2] == (size, size)
    assert modalities.get(name).render(value).shape == (size, size, 3)
    kind = tokenizer_recipe(name).kind
    made = tokenizer(name, size, np.stack([pack_value(kind, value)]))
    assert made.num_tokens == tokens
    ids = made.encode_values([value])
    assert ids.shape == (1, tokens)
    (back,) = made.decode_tokens(ids)
    assert back.shape == value.shape
    if f"tok_{name}" in ("tok_rgb", "tok_depth", "tok_normal", "tok_semseg"):
        assert released_spec(f"tok_{name}@{size}").max_tokens == tokens


@pytest.mark.parametrize("name", PICTURES)
def test_a_network_of_224_pixels_tokenizes_448_with_a_larger_grid(name) -> None:
    small, large = cropped(name, 224), cropped(name, 448)
    kind = tokenizer_recipe(name).kind
    made = tokenizer(name, 224, np.stack([pack_value(kind, small)]))
    ids = made.encode_values([large])
    assert ids.shape == (1, 784)
    assert made.decode_tokens(ids)[0].shape == large.shape


@pytest.mark.parametrize("size", [224, 448])
@pytest.mark.parametrize("name", [*GRIDS, *WHOLE])
def test_features_keep_the_grid_of_their_labels_at_any_size(name, size) -> None:
    value = cropped(name, size)
    made = tokenizer(name, size, np.stack([pack_value(tokenizer_recipe(name).kind, value)]))
    tokens = 16  # of a grid of 4 x 4, and of a vector
    assert made.encode_values([value]).shape == (1, tokens) == (1, made.num_tokens)


@pytest.mark.parametrize("size", [224, 448])
def test_texts_tell_places_at_either_size(size) -> None:
    page, form = page_of(MANY, size=size), form_of("sam_instance")
    value = cropped("sam_instance", size)
    assert value["size"] == [size, size]
    back = form.read(form.write(value, page), page)
    assert back["size"] == [size, size]
    given = [each["box"] for each in value["instances"]]
    assert all(each["box"] in given for each in back["instances"])
    poses = form_of("human_poses")
    line = poses.write(cropped("human_poses", size), page)
    assert line == poses.write(cropped("human_poses", 224), page)  # shares of the picture


def test_released_grids_of_14_pixels_have_as_many_tokens_as_their_networks() -> None:
    assert released_spec("tok_dinov2@224").max_tokens == 256
    assert released_spec("tok_dinov2@448").max_tokens == 1024
    assert released_spec("rgb@448").max_tokens == 784
