"""Captions, from any captioner of `AutoModelForImageTextToText` that needs no chat: BLIP, GIT, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.labelers.base import Image, Labeler, LabelerSpec, options_of, stack


class CaptionLabeler(Labeler):
    """Writes "caption": a text.

    Options:
        max_new_tokens: Longest caption, tokens (60).
        num_beams: Beams of the search; 1 is greedy (1).
        prompt: Text that the caption continues ("": none).

    Raises:
        ValueError: An option is unknown or out of its range.
    """

    def __init__(self, spec: LabelerSpec) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        super().__init__(spec)
        options = options_of(spec, max_new_tokens=60, num_beams=1, prompt="")
        self.prompt = options.pop("prompt")
        for name, value in options.items():
            if value < 1:
                raise ValueError(f"{name}={value} of a captioner is below 1")
        self.search = options
        self.processor = AutoProcessor.from_pretrained(**self.pretrained())
        self.model = self.place(
            AutoModelForImageTextToText.from_pretrained(**self.pretrained(), dtype=torch.float32)
        )

    def predict(self, images: Sequence[Image]) -> dict[str, list[Any]]:
        text = {"text": [self.prompt] * len(images)} if self.prompt else {}
        inputs = self.processor(images=list(stack(images)), return_tensors="pt", **text)
        tokens = self.model.generate(**inputs.to(self.device), do_sample=False, **self.search)
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return {"caption": [text.strip() for text in texts]}
