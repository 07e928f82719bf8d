"""What every labeler shares: its specification, device, precision, compilation and batches."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from infra.fitting import FittingBatches
from infra.machine import check_compiler, chosen_device, fast_bf16

logger = logging.getLogger("fourm.label")
Image = NDArray[np.uint8]
"""An RGB image, uint8 [H, W, 3]."""

SHIPPED = "shipped:"
"""Prefix of a model id that names a folder of this package's `weights`, as in "shipped:depth"."""

COMPUTED = "computed"
"""Model id of labelers that have no weights: they compute, and their class has a `version`."""

ORIGINAL_SIZE = "original_size"

WEIGHTS = Path(__file__).parent / "weights"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class LabelerSpec:
    """Which network labels images, and how it is run.

    Attributes:
        name: The labeler's kind: a key of `registry.KINDS`, such as "depth".
        outputs: The modalities that it writes.
        model_id: A hub id, a folder, "shipped:NAME" for weights of this package, or "computed"
            where there are none.
        revision: Commit or tag of a hub model; "" is the hub's default.
        batch_size: Images a forward pass (halved as often as memory demands).
        precision: "fp32", "bf16" or "fp16" (autocast), or "auto": bf16 where the device is
            fast at it, else fp32.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
        options: Of the kind, such as {"threshold": 0.3}; its class documents them.
        compile: Run the network through torch.compile, which takes a while once for each shape of
            its input.

    Raises:
        ValueError: A field has a value outside of its choices.
    """

    name: str
    outputs: tuple[str, ...]
    model_id: str
    revision: str = ""
    batch_size: int = 32
    precision: str = "auto"
    device: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    compile: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} of labeler {self.name!r} is not one of "
                    + ", ".join(choices)
                )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} of labeler {self.name!r} is below 1")

    @property
    def source(self) -> str:
        """What `from_pretrained` takes: a folder or a hub id.

        Raises:
            ValueError: The shipped weights do not exist.
        """
        if not self.model_id.startswith(SHIPPED):
            return self.model_id
        folder = WEIGHTS / self.model_id.removeprefix(SHIPPED)
        if not folder.is_dir():
            choices = sorted(path.name for path in WEIGHTS.iterdir() if path.is_dir())
            raise ValueError(
                f"no shipped weights {self.model_id!r}; there are "
                + (", ".join(SHIPPED + name for name in choices) or "none")
            )
        return str(folder)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return {**asdict(self), "outputs": list(self.outputs)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LabelerSpec:
        """Rebuild what `to_dict` wrote."""
        return cls(**{**fields, "outputs": tuple(fields["outputs"])})


class Labeler(ABC):
    """A network that writes one or more modalities for any images.

    A subclass loads its model in `__init__` (after `super().__init__`, through
    `self.pretrained()`) and labels batches of images in `predict`, which have one size unless it
    tells by `seen` which sizes may meet. One that looks at more than the picture names what it
    `reads` and overrides `label_samples`.
    """

    reads: ClassVar[tuple[str, ...]] = ("rgb",)
    """Modalities without which a sample cannot be labelled."""
    also_reads: ClassVar[tuple[str, ...]] = ()
    """Modalities that are looked at where a sample has them."""
    asks_size: ClassVar[bool] = False
    """Whether samples tell it the size in which their pictures came, before they were made smaller
    to be stored: (width, height) under `ORIGINAL_SIZE`, where that is known."""
    version: ClassVar[int] = 1
    """Raised when the labels change that a class without weights computes."""
    compiles: ClassVar[bool] = False
    """Whether it has a network that it passes through `compiled`."""
    at_once: ClassVar[int] = 1
    """Batches of samples that it had best be handed together."""

    def __init__(self, spec: LabelerSpec) -> None:
        import torch
        from transformers.utils import logging as chatter

        chatter.disable_progress_bar()  # workers log; nobody watches bars there
        self.spec = spec
        device = chosen_device(spec.device)
        self.device = torch.device(device)
        if spec.compile:
            if not self.compiles:
                raise ValueError(f"labeler {spec.name!r} has no network that can be compiled")
            check_compiler(device)
        self.precision = spec.precision
        if self.precision == "auto":
            self.precision = "bf16" if fast_bf16(device) else "fp32"
        self.autocast_dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[
            self.precision
        ]
        self._batches = FittingBatches(spec.batch_size, f"labeler {spec.name}")
        self._compiled: list[Any] = []

    def pretrained(self) -> dict[str, Any]:
        """Arguments that every `from_pretrained` of a model or processor gets.

        Code of a repository is never run: unless told so, transformers would ask on a terminal.
        """
        source = {
            "pretrained_model_name_or_path": self.spec.source, "trust_remote_code": False,
        }  # fmt: skip
        return source | ({"revision": self.spec.revision} if self.spec.revision else {})

    def load(self, kind: Any, spare: Sequence[str] = ()) -> Any:
        """Load the checkpoint through a class of transformers, in float32.

        Args:
            kind: The class, such as `AutoModel`.
            spare: Parts of the network whose output is not looked at.

        Raises:
            OSError: The weights cannot be found.
            ValueError: The checkpoint holds nothing of a part, as one of a backbone alone holds no
                head: the part would be left at random, and so would be the labels.
        """
        import torch

        model, told = kind.from_pretrained(
            **self.pretrained(), dtype=torch.float32, output_loading_info=True
        )
        missing = set(told["missing_keys"])
        for name, part in model.named_children():
            weights = {f"{name}.{each}" for each, _ in part.named_parameters()}
            if weights and weights <= missing and name not in spare:
                raise ValueError(
                    f"{self.spec.model_id} holds no weights of {name!r}, which "
                    f"{type(model).__name__} needs: take a checkpoint that was trained for "
                    f"{self.spec.name!r}"
                )
        return model

    def place(self, model: Any) -> Any:
        """Return a model in evaluation mode on the labeler's device, gradients off."""
        import torch

        model = model.eval().requires_grad_(False)
        return model.to(self.device, memory_format=torch.channels_last)

    def compiled(self, network: Any) -> Any:
        """Return a network whose calls are compiled, if the specification says so.

        Each shape of its input has kernels of its own, which know the shape (see `filled`), up to
        torch's limit of 8 shapes; in others it runs as it is, and so it does from a compilation on
        that fails.
        """
        if self.spec.compile:
            network.compile(dynamic=False)
            self._compiled.append(network)
        return network

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inference mode, and autocast where the precision asks for it."""
        import torch

        with (
            torch.inference_mode(),
            torch.autocast(
                self.device.type,
                dtype=self.autocast_dtype or torch.bfloat16,
                enabled=self.autocast_dtype is not None,
            ),
        ):
            yield

    @abstractmethod
    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        """Label at most `spec.batch_size` images that are `seen` as one shape: have one size,
        unless the labeler says otherwise.

        Runs inside `inference()`. Values are those of the modality table, at the images' sizes.
        """

    def seen(self, height: int, width: int) -> Hashable:
        """The shape in which the network sees pictures of a size; those of one shape make a batch
        and `predict` takes them together. By default each size is a shape of its own."""
        return height, width

    def alike(self, sample: Mapping[str, Any]) -> Hashable:
        """What samples of one batch have in common; see `label_samples`."""
        return self.seen(*sample["rgb"].shape[:2]) if "rgb" in sample else None

    @property
    def fitting(self) -> int:
        """Images of a forward pass that have found memory so far."""
        return self._batches.size

    def label(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        """Label images of any sizes.

        Args:
            images: RGB, uint8 [H, W, 3] each.

        Returns:
            For each of `spec.outputs` one value an image, in the images' order.

        Raises:
            MemoryError: A single image is too large for the memory.
            ValueError: An image is no uint8 [H, W, 3] array.
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(
                    f"labelers take uint8 [H, W, 3] images, not {image.dtype} {image.shape}"
                )
        results: dict[str, list[Any]] = {name: [None] * len(images) for name in self.spec.outputs}
        shapes: dict[Hashable, list[int]] = {}
        for number, image in enumerate(images):
            shapes.setdefault(self.seen(*image.shape[:2]), []).append(number)
        for numbers in shapes.values():
            self._label_group(images, numbers, results)
        return results

    def label_samples(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Label samples: each holds a value of every modality of `reads`, and of `also_reads` as
        far as it has them."""
        return self.label([sample["rgb"] for sample in samples])

    def in_batches(self, items: Sequence[Any]) -> dict[str, list[Any]]:
        """Hand items other than images to `predict`, a batch at a time."""
        results: dict[str, list[Any]] = {name: [None] * len(items) for name in self.spec.outputs}
        self._label_group(items, list(range(len(items))), results)
        return results

    def _label_group(
        self, items: Sequence[Any], numbers: list[int], results: dict[str, list[Any]]
    ) -> None:
        def label(chosen: Sequence[int]) -> dict[str, list[Any]]:
            batch = self.filled([items[number] for number in chosen])
            return self._predict_compiled(batch) if self._compiled else self._predict(batch)

        for chosen, values in self._batches(label, numbers):
            for name in self.spec.outputs:
                for number, value in zip(chosen, values[name], strict=not self.spec.compile):
                    results[name][number] = value

    def _predict(self, items: list[Any]) -> dict[str, list[Any]]:
        with self.inference():
            return self.predict(items)

    def _predict_compiled(self, items: list[Any]) -> dict[str, list[Any]]:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._predict(items)
        except TorchDynamoException as error:
            # Such as a kernel that a killed process left half written in torch's cache.
            logger.warning("%s: goes on uncompiled: %s", self.spec.name, str(error)[:500])
        while self._compiled:
            self._compiled.pop()._compiled_call_impl = None
        return self._predict(items)

    def filled(self, items: list[Any]) -> list[Any]:
        """Items of a batch; for a compiled network of a full one, the last item repeated, so that
        no kernels are made for what is left over at the end."""
        missing = self._batches.size - len(items) if self.spec.compile else 0
        return items + items[-1:] * missing


def weights_file(spec: LabelerSpec, name: str) -> Path:
    """A file of a model's folder, or of its repository of the hub.

    Raises:
        OSError: It is not there.
    """
    from huggingface_hub import hf_hub_download

    if Path(spec.source).is_dir():
        return Path(spec.source) / name
    return Path(hf_hub_download(spec.source, name, revision=spec.revision or None))


def by_size(images: Sequence[Image]) -> list[list[int]]:
    """Places of the images of each size, in the order of the first of each."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        found.setdefault(image.shape, []).append(number)
    return list(found.values())


def stack(images: Sequence[Image]) -> Any:
    """Return images of one size as one uint8 tensor [B, 3, H, W]."""
    import torch

    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def resize(maps: Any, images: Sequence[Image]) -> Any:
    """Return maps [B, C, h, w] at the size of the images (bilinear, edges as pixel borders)."""
    from torch.nn.functional import interpolate

    size = images[0].shape[:2]
    return maps if maps.shape[-2:] == size else interpolate(maps, size, mode="bilinear")


def sure_of(*outputs: Any) -> None:
    """Look for NaN in what a network gave, before it becomes what cannot hold one: classes, boxes
    or masks.

    Raises:
        ValueError: there is one, as where a network's activations have overflowed.
    """
    if any(bool(output.isnan().any()) for output in outputs):
        raise ValueError("the network's output is not a number")


def options_of(spec: LabelerSpec, **defaults: Any) -> dict[str, Any]:
    """Return a specification's options over their defaults.

    Raises:
        ValueError: An option has no default, that is, it does not exist.
    """
    if unknown := sorted(set(spec.options) - set(defaults)):
        raise ValueError(
            f"labeler {spec.name!r} has no option {', '.join(unknown)}; "
            + (f"it has {', '.join(sorted(defaults))}" if defaults else "it has none")
        )
    return defaults | spec.options
