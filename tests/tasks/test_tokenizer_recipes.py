"""Recipes of tokenizers: names stay, choices that cannot work are refused."""

import numpy as np
import pytest

from tasks.tokenizer_config import TextRecipe, TokenizerRecipe, identity
from tasks.tokenizer_recipes import PRESETS, tokenizer_recipe


def test_recipes_that_use_nothing_new_keep_the_fields_their_stored_tokenizers_are_named_by():
    assert identity(tokenizer_recipe("depth")) == {
        "kind": "depth", "size": 128, "patch": 16, "levels": (8, 5, 5, 5), "quantizer": "fsq",
        "width": 256, "encoder_depth": 1, "decoder_depth": 2, "jitter": 0.0, "num_classes": 0,
        "depth_mode": "log", "steps": 500, "batch_size": 32, "lr": 1e-2, "min_scale": 0.8,
        "max_samples": 4000, "seed": 0,
    }
    assert identity(tokenizer_recipe("depth", registers=16))["registers"] == 16
    assert identity(TextRecipe()) == {"bins": 1000, "vocab_size": 30_000, "class_names": ()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "depth", "perceptual": 1.0}, "is for rgb, not for depth"),
        ({"kind": "feature", "sizes": (64,)}, "feature values have one size"),
        ({"kind": "rgb", "weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        ({"kind": "rgb", "min_lr_ratio": 1.5}, "min_lr_ratio=1.5 lie in 0..1"),
        ({"kind": "rgb", "sizes": (64, 72)}, "72 is no multiple of patch=16"),
        ({"kind": "rgb", "sizes": (256,)}, "256 is no multiple of patch=16 up to size=128"),
    ],
)
def test_choices_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenizerRecipe(**changes)


def test_a_step_draws_one_size_for_all_workers():
    from tasks.tokenizer_task import ReconstructionTask

    recipe = TokenizerRecipe(kind="semseg", size=32, patch=8, sizes=(16, 32), batch_size=4)
    packed = np.random.default_rng(0).integers(0, 5, (6, 32, 32), dtype=np.uint8)
    task = ReconstructionTask(recipe, recipe.resolved(packed), recipe.codec(packed), packed)
    shapes = [[tuple(task.batch(step, rank, 2).shape) for rank in (0, 1)] for step in range(12)]
    assert all(ours == theirs for ours, theirs in shapes)
    assert {shape for pair in shapes for shape in pair} == {(2, 16, 16), (2, 32, 32)}
    assert set(np.unique(task.batch(0, 0, 2))) <= set(range(5))  # classes are not mixed


PUBLISHED = {
    "rgb": 286.9e6, "rgb_1k": 181e6, "rgb_1k_divae": 218e6, "semseg": 218.9e6, "clip": 181e6,
    "dinov2_global": 115e6,
}  # fmt: skip
"""Parameters of the released networks."""


@pytest.mark.parametrize("preset", ["scenes", "modern", "released"])
def test_every_recipe_builds_on_the_meta_device_and_decodes_what_it_encodes(preset):
    from tasks.tokenizer_plan import plan_lines, plan_tokenizer

    chosen = {name: recipe for name, recipe in PRESETS[preset].items() if "_448" not in name}
    plans = {name: plan_tokenizer(name, recipe) for name, recipe in chosen.items()}
    for name, plan in plans.items():
        assert plan.flops > 0
        if preset == "released" and name in PUBLISHED:
            assert plan.parameters == pytest.approx(PUBLISHED[name], rel=3e-3)
    assert len(list(plan_lines(plans))) == len(plans) + 2
    vocabularies = {name: (plan.vocab_size, plan.tokens) for name, plan in plans.items()}
    if preset == "released":
        assert vocabularies["rgb"] == (16_384, 196)
        assert vocabularies["semseg"] == (4096, 196)
        assert vocabularies["dinov2"] == (8192, 256)
        assert vocabularies["dinov2_global"] == (8192, 16)
        assert vocabularies["smpl_poses"] == (1024, 8)
        assert vocabularies["sam_instance"] == (1024, 16)


def test_released_recipes_decay_weights_and_rates_as_the_released_tokenizers_were_trained():
    for name, recipe in PRESETS["released"].items():
        training = recipe.training()
        assert (training.weight_decay, training.min_lr_ratio) == (0.05, 0.0), name
        assert training.clip_norm == 1.0
        assert training.betas == (0.9, 0.99)
    assert PRESETS["released"]["sam_instance"].ema == 0.0
    own = tokenizer_recipe("depth").training()
    assert (own.weight_decay, own.min_lr_ratio) == (0.01, 0.02)


def test_adaptation_goes_on_at_sides_up_to_448():
    recipe = tokenizer_recipe("rgb", "released", "rgb_448", start="tokenizers/rgb@0")
    assert (recipe.size, min(recipe.sizes), max(recipe.sizes)) == (448, 224, 448)
    assert recipe.architecture == "unet"
    assert recipe.ema == 0.9999


@pytest.mark.parametrize("preset", ["scenes", "modern", "released"])
def test_networks_for_224_px_take_448_px_at_four_times_the_tokens(preset):
    import torch

    from tasks.tokenizer_task import build_network

    small = {"size": 224, "width": 64, "heads": 1, "encoder_depth": 1, "decoder_depth": 1}
    recipe = tokenizer_recipe("semseg", preset, **small, num_classes=5)
    net = build_network(recipe.network(np.zeros((1, 224, 224), np.uint8))).eval()
    classes = torch.zeros(1, 448, 448, dtype=torch.uint8)
    with torch.inference_mode():
        tokens = net.encode(classes)
        assert tokens.shape == (1, 28, 28)
        assert net.decode(tokens).shape == (1, 5, 448, 448)
        assert net.encode(classes[:, :224, :224]).shape == (1, 14, 14)


def test_the_plan_of_the_command_line_follows_its_form():
    from pipelines.params import PlanTokenizersParams
    from pipelines.plan_tokenizers import run

    form = PlanTokenizersParams(
        preset="modern", modalities=["rgb"], recipes={"rgb": "rgb_adaptive"},
        changes={"rgb": {"registers": 32}},
    )
    head, line, _ = run(form)
    row = dict(zip(head.split(), line.split(), strict=True))
    assert (row["recipe"], row["tokens"], row["codes"]) == ("rgb", "32", "15360")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "rgb", "preset": "old"}, "choose one of scenes, modern, released"),
        ({"name": "rgb", "preset": "released", "named": "rgb_2k"}, "rgb_1k"),
        ({"name": "rgb", "preset": "released", "named": "depth"}, "is for depth values, not for"),
        ({"name": "human_poses"}, "no tokenizer recipe for 'human_poses'"),
        ({"name": "rgb", "colour": 1}, "no 'colour'; its fields are kind"),
        ({"name": "semseg", "architecture": "unet"}, "'unet' takes rgb.*not semseg values"),
        ({"name": "rgb", "architecture": "vit", "registers": 4}, "need the architecture 'light'"),
        ({"name": "rgb", "encoder": "a", "start": "b"}, "choose one"),
    ],
)
def test_recipes_that_do_not_exist_are_refused_with_the_choices(given, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_recipe(**given)


def _train(store, name, recipe, packed):
    from tasks.tokenizer_task import reconstruction_task
    from tasks.trainer import Trainer
    from tokenizers_vq.tokenizer import Tokenizer

    task = reconstruction_task(store, name, recipe, packed)
    net = Trainer(store, f"runs/{recipe.architecture}", task, recipe.training(1)).fit().model
    return Tokenizer(name, net, task.codec, "fp32")


SMALL = {
    "size": 32, "patch": 8, "width": 64, "encoder_depth": 1, "decoder_depth": 1, "codes": 32,
    "latent": 8, "batch_size": 4, "steps": 2, "warmup": 0, "eval_every": 0, "max_samples": 8,
}  # fmt: skip
FAMILY = {
    "rgb": {"preset": "released", "decoder_width": 32, "guidance_dropout": 0.5},
    "normal": {"preset": "released", "architecture": "uvit", "decoder_width": 192,
               "prediction": "v_prediction-epsilon_loss"},
    "semseg": {"preset": "released", "num_classes": 5},
    "depth": {"preset": "released", "architecture": "vit"},
    "dinov2_global": {"preset": "released", "groups": 4},
    "sam_instance": {"preset": "released"},
}  # fmt: skip


def _packed(name):
    rng = np.random.default_rng(0)
    if name == "semseg":
        return np.where(rng.random((8, 32, 32)) < 0.1, 255, rng.integers(0, 4, (8, 32, 32))
                        ).astype(np.uint8)
    if name == "depth":
        return rng.uniform(0.1, 1, (8, 32, 32)).astype(np.float16)
    if name == "dinov2_global":
        return rng.normal(size=(8, 12)).astype(np.float32)
    if name == "normal":
        return rng.integers(-127, 128, (8, 32, 32, 3), dtype=np.int8)
    return rng.integers(0, 256, (8, 32, 32, 3) if name == "rgb" else (8, 32, 32), dtype=np.uint8)


@pytest.mark.parametrize("name", FAMILY)
def test_released_architectures_train_and_are_stored_as_released_files_are(tmp_path, name):
    from infra.store import Store
    from tokenizers_vq.released.network import ReleasedVQ, Sampling
    from tokenizers_vq.tokenizer import from_files

    recipe = tokenizer_recipe(name, **{**SMALL, **FAMILY[name]})
    packed = _packed(name)
    tokenizer = _train(Store(str(tmp_path)), name, recipe, packed)
    again = from_files(tokenizer.files(), "fp32")
    assert isinstance(again.net, ReleasedVQ)
    tokens = tokenizer.encode_packed(packed)
    assert (again.encode_packed(packed) == tokens).all()
    assert again.codec == tokenizer.codec
    again.net.sampling = tokenizer.net.sampling = Sampling(steps=2)
    ours, theirs = tokenizer.decode_tokens(tokens[:2]), again.decode_tokens(tokens[:2])
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    if name != "dinov2_global":  # memcodes have no moving counts
        below = again.net.quantize.dead_below
        assert below == pytest.approx(4 * tokens.shape[1] / 32 / recipe.dead_code)


def test_unlabelled_pixels_are_a_class_of_the_released_contract(tmp_path):
    from infra.store import Store

    recipe = tokenizer_recipe("semseg", **{**SMALL, **FAMILY["semseg"]})
    codec = recipe.codec(_packed("semseg"))
    assert codec.class_offset == 1
    assert codec.to_tensor(np.array([[[255, 0, 3]]], np.uint8)).tolist() == [[[0, 1, 4]]]
    assert recipe.network(_packed("semseg")).num_classes == 5
    _train(Store(str(tmp_path)), "semseg", recipe, _packed("semseg"))


def test_a_diffusion_decoder_is_trained_behind_frozen_codes_and_start_goes_on(tmp_path):
    import torch

    from infra.store import Store

    store, packed = Store(str(tmp_path)), _packed("rgb")
    plain = {**SMALL, "preset": "released", "architecture": "vit", "loss": "mse"}
    before = _train(store, "rgb", tokenizer_recipe("rgb", **plain), packed)
    before.save(tmp_path / "tokenizers" / "rgb@0")
    tokens = before.encode_packed(packed)
    frozen = tokenizer_recipe("rgb", **{**plain, "architecture": "uvit", "decoder_width": 192,
                                        "encoder": "tokenizers/rgb@0"})
    behind = _train(store, "rgb", frozen, packed)
    assert (behind.encode_packed(packed) == tokens).all()
    assert behind.net.diffusion is not None
    adapted = tokenizer_recipe("rgb", **{**plain, "size": 64, "sizes": (32, 48, 64), "seed": 1,
                                         "start": "tokenizers/rgb@0"})
    larger = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "runs").rename(tmp_path / "old")
    further = _train(store, "rgb", adapted, larger)
    assert further.net.config.grid == 4
    assert further.encode_packed(larger).shape == (8, 64)
    assert not torch.equal(further.net.encoder.proj.weight, before.net.encoder.proj.weight)
    with pytest.raises(ValueError, match="is of another family of networks than"):
        _train(store, "rgb", tokenizer_recipe("rgb", encoder="tokenizers/rgb@0"), packed)


def test_a_new_decoder_is_trained_behind_the_codes_of_a_stored_tokenizer(tmp_path):
    import torch

    from infra.store import Store
    from tasks.tokenizer_task import reconstruction_task
    from tasks.trainer import Trainer
    from tokenizers_vq.ordered import build_network
    from tokenizers_vq.tokenizer import Tokenizer

    packed = np.random.default_rng(0).uniform(0.1, 1, (8, 32, 32)).astype(np.float16)
    first = TokenizerRecipe(kind="depth", size=32, patch=8, width=16, batch_size=4, steps=3)
    before = Tokenizer("depth", build_network(first.resolved(packed)), first.codec(packed), "fp32")
    before.save(tmp_path / "tokenizers" / "depth@0")
    store = Store(str(tmp_path))
    recipe = TokenizerRecipe(**{**identity(first), "encoder": "tokenizers/depth@0",
                                "decoder_depth": 3})
    task = reconstruction_task(store, "depth", recipe, packed)
    after = Trainer(store, "runs/decoder", task, recipe.training(1)).fit().model.eval()
    assert len(after.decoder) == 3
    x = task.codec.to_tensor(packed)
    with torch.no_grad():
        tokens = before.net.encode(x)
        assert torch.equal(after.encode(x), tokens)
        torch.manual_seed(recipe.seed)
        assert not torch.equal(after.decode(tokens), task.build_model().eval().decode(tokens))
    with pytest.raises(ValueError, match="is a tokenizer of depth, not of rgb"):
        reconstruction_task(store, "rgb", recipe, packed)


def test_vectors_become_ordered_tokens_of_a_single_cell():
    from tokenizers_vq.ordered import OrderedVQ, build_network

    recipe = TokenizerRecipe(kind="vector", registers=4, width=16)
    packed = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    codec, network = recipe.codec(packed), recipe.resolved(packed)
    assert (network.channels, network.image_size, network.num_tokens) == (12, 1, 4)
    net = build_network(network).eval()
    assert isinstance(net, OrderedVQ)
    tokens = net.encode(codec.to_tensor(packed))
    assert tokens.shape == (5, 4)
    assert codec.from_tensor(net.decode(tokens[:, :2]))[0].shape == (12,)


@pytest.mark.parametrize("changes", [
    {}, {"spread": 1.0, "jitter": 0.1}, {"registers": 4}, {"quantizer": "vq"},
    {"quantizer": "lfq"}, {"architecture": "vit", "loss": "mse", "muon": False, "width": 192},
])
def test_a_batch_that_is_not_finite_is_skipped_and_leaves_no_trace_in_the_codes(tmp_path, changes):
    import torch

    from infra.store import Store
    from tasks.tokenizer_task import ReconstructionTask
    from tasks.trainer import Trainer

    class Broken(ReconstructionTask):
        def batch(self, step: int, rank: int, world: int) -> torch.Tensor:
            values = super().batch(step, rank, world)
            if step == 1:
                values[0] = float("nan")
            return values

    recipe = TokenizerRecipe(**{"kind": "rgb", "size": 32, "patch": 8, "width": 32, "heads": 2,
                                "batch_size": 4, "steps": 3, "levels": (4, 4), **changes})
    packed = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    task = Broken(recipe, recipe.network(packed), recipe.codec(packed), packed)
    result = Trainer(Store(str(tmp_path)), "run", task, recipe.training()).fit()
    assert result.skipped == 1
    assert [name for name, value in result.model.state_dict().items()
            if not value.isfinite().all()] == []
