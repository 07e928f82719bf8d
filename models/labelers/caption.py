"""Captions, from any captioner of `AutoModelForImageTextToText` that needs no chat: BLIP, GIT, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from models.labelers.base import Image, LabelerSpec, options_of
from models.labelers.inputs import InParts, Inputs


class CaptionLabeler(InParts):
    """Writes "caption": a text. What is compiled is the part that looks at the picture; a text
    grows word by word.

    Options:
        max_new_tokens: Longest caption, tokens (60).
        num_beams: Beams of the search; 1 is greedy (1).
        prompt: Text that the caption continues ("": none).

    Raises:
        ValueError: An option is unknown or out of its range.
    """

    compiles: ClassVar[bool] = True

    def __init__(self, spec: LabelerSpec) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        super().__init__(spec)
        options = options_of(spec, max_new_tokens=60, num_beams=1, prompt="")
        self.prompt = options.pop("prompt")
        for name, value in options.items():
            if value < 1:
                raise ValueError(f"{name}={value} of a captioner is below 1")
        self.search = options
        self.inputs = Inputs(self, AutoProcessor.from_pretrained(**self.pretrained()))
        self.model = self.place(self.load(AutoModelForImageTextToText))
        if spec.compile:
            self.compiled(self._vision_part())

    def prepare(self, images: Sequence[Image]) -> Any:
        text = {"text": [self.prompt] * len(images)} if self.prompt else {}
        return self.inputs(images, **text)

    def forward(self, inputs: Any) -> Any:
        return self.model.generate(**inputs, do_sample=False, **self.search)

    def finish(self, outputs: Any, images: Sequence[Image]) -> dict[str, list[Any]]:
        texts = self.inputs.processor.batch_decode(outputs, skip_special_tokens=True)
        return {"caption": [text.strip() for text in texts]}

    def _vision_part(self) -> Any:
        names = ("vision_model", "vision_tower", "image_encoder")
        for name, part in self.model.named_modules():
            if name.rpartition(".")[2] in names:
                return part
        raise ValueError(f"{self.spec.model_id}: none of {', '.join(names)} is there to compile")
