"""Pictures on their way into a network of transformers: on its device, in batches of one shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from models.labelers.base import Image, Labeler, by_size, resize, stack

_SIZES = 2**16  # sizes of pictures whose shapes are remembered
_SAMPLES = ((1, 1), (40, 56), (600, 300))  # sizes on which a processor is tried


class Inputs:
    """A processor of transformers, at work where the network is.

    Pictures travel to the device as bytes, those of one size together, and are resized and
    normalised there, all of one size at once. A filter that torchvision has for CPUs alone
    (Lanczos) is applied on the CPU.

    Args:
        labeler: Whose device and checkpoint it is.
        processor: Of images, or one that has such a part.
        fixed: Arguments of every call.
    """

    def __init__(self, labeler: Labeler, processor: Any, **fixed: Any) -> None:
        self.processor, self._device, self._fixed = processor, labeler.device, fixed
        self._compiled = labeler.spec.compile
        self._images = getattr(processor, "image_processor", processor)
        on_device = getattr(self._images, "backend", "") == "torchvision" and not _lanczos(
            self._images
        )
        self._place = self._device if on_device else "cpu"
        self.squeeze: Callable[[Any], Any] | None = None
        if on_device and self._device.type == "cpu":
            _keep_packed(self._images)
            if processor is self._images:
                self._fixed["disable_grouping"] = False
                self.squeeze = _squeeze(processor, self._fixed)
        self.shape: Callable[[int, int], tuple[int, ...]] = lru_cache(_SIZES)(self._shape)

    def __call__(self, images: Sequence[Image], **more: Any) -> Any:
        """What the network takes, on its device.

        Args:
            images: Of any sizes whose `shape` is one.
            more: Arguments of the processor.
        """
        if self.squeeze is not None and not more:
            return {"pixel_values": self._squeezed(images, self.squeeze)}
        pixels = rows(images, self._place)
        made = self.processor(images=pixels, return_tensors="pt", **self._fixed, **more)
        made = made.to(self._device)
        if self._compiled:  # kernels know how their input lies in memory: always in one way
            made["pixel_values"] = made["pixel_values"].contiguous()
        return made

    def _squeezed(self, images: Sequence[Image], squeeze: Callable[[Any], Any]) -> Any:
        import torch

        if len(by_size(images)) == 1:
            return squeeze(stack(images))
        return torch.stack(rows(images, self._place, squeeze))

    def _shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape in which the network sees pictures of a size, without a pixel being computed; of a
        processor that does not tell, the size itself."""
        import torch

        picture = torch.empty(3, height, width, dtype=torch.uint8, device="meta")
        try:
            made = self._images(images=[picture], return_tensors="pt", **self._fixed)
            return tuple(made["pixel_values"].shape)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            return (height, width)


class InParts(Labeler):
    """A labeler whose work falls into three parts, of which only the middle one is its network's.

    On a CPU the outer two can run in other threads, on other cores, while the network is busy with
    the batches before and after (see `tasks.label_work`); `predict` is all three in turn. Each runs
    inside `inference()`.
    """

    inputs: Inputs

    @property
    def apart(self) -> bool:
        """Whether the parts may be called one by one: the network is on the CPU, and no subclass
        has put something else in the place of all three."""
        own, whole = type(self), (InParts.predict, Labeler.label_samples)
        return self.device.type == "cpu" and (own.predict, own.label_samples) == whole

    def seen(self, height: int, width: int) -> Hashable:
        return self.inputs.shape(height, width)

    def prepare(self, images: Sequence[Image]) -> Any:
        """What the network takes of the images of a batch."""
        return self.inputs(images)

    @abstractmethod
    def forward(self, inputs: Any) -> Any:
        """What the network makes of that, as it is."""

    @abstractmethod
    def finish(self, outputs: Any, images: Sequence[Image]) -> dict[str, list[Any]]:
        """Labels of the images out of what the network made."""

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        return self.finish(self.forward(self.prepare(images)), images)


def rows(
    images: Sequence[Image], device: Any, make: Callable[[Any], Any] = lambda pixels: pixels
) -> list[Any]:
    """A row of a tensor for each picture, in their order.

    Args:
        images: Of any sizes; those of one size are moved and worked on together.
        device: Where.
        make: uint8 [b, 3, H, W] to [b, ...].
    """
    found: list[Any] = [None] * len(images)
    for numbers in by_size(images):
        made = make(stack([images[number] for number in numbers]).to(device))
        for number, row in zip(numbers, made, strict=True):
            found[number] = row
    return found


def at_sizes(
    maps: Any, images: Sequence[Image], finish: Callable[[Any], Any]
) -> list[Any]:
    """Maps [B, C, h, w] of a network as arrays at the sizes of the pictures, in their order.

    Args:
        maps: On any device.
        images: The B pictures.
        finish: Maps of one size [b, C, H, W] to values [b, ...], on the device.
    """
    found: list[Any] = [None] * len(images)
    for numbers in by_size(images):
        chosen = maps if len(numbers) == len(images) else maps[numbers]
        values = finish(resize(chosen, [images[number] for number in numbers]))
        for number, value in zip(numbers, values.cpu().numpy(), strict=True):
            found[number] = value
    return found


def _keep_packed(processor: Any) -> None:
    """Let a processor take pictures as they are, colours side by side, where it would unpack each
    into planes first: on a CPU that takes longer than to resize them, which needs them packed."""
    from transformers.image_processing_backends import TorchvisionBackend

    if type(processor).process_image is TorchvisionBackend.process_image:
        processor.process_image = lambda image, **_: image


def _squeeze(processor: Any, fixed: dict[str, Any]) -> Callable[[Any], Any] | None:
    """The steps of a processor that squeezes pictures into one size and scales their values, uint8
    [b, 3, H, W] to float32 [b, 3, h, w]; None of one that does anything else, as samples show.

    What is left out takes as long as these steps: pictures are checked, put together, taken apart
    and put together again.
    """
    import torch
    from transformers.image_utils import SizeDict

    def told(name: str) -> Any:
        value = fixed.get(name, getattr(processor, name, None))
        return tuple(value) if isinstance(value, list) else value

    def squeeze(pixels: Any) -> Any:
        pixels = processor.resize(pixels, size, told("resample")).contiguous()
        return processor.rescale_and_normalize(
            pixels, told("do_rescale"), told("rescale_factor"), told("do_normalize"),
            told("image_mean"), told("image_std"),
        )  # fmt: skip

    size = SizeDict(**dict(told("size") or {}))
    if not (told("do_resize") and size.height and size.width):
        return None
    rng = np.random.default_rng(0)
    for shape in _SAMPLES:
        pictures = [rng.integers(0, 256, (*shape, 3), np.uint8) for _ in range(2)]
        made = processor(images=rows(pictures, "cpu"), return_tensors="pt", **fixed)
        if made.keys() != {"pixel_values"}:
            return None
        if not torch.equal(made["pixel_values"], squeeze(stack(pictures))):
            return None
    return squeeze


def _lanczos(processor: Any) -> bool:
    from PIL.Image import Resampling

    return getattr(processor, "resample", None) == Resampling.LANCZOS
