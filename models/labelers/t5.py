"""Captions as embeddings, from the encoder of any T5 of `AutoModelForTextEncoding`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from models.labelers.base import Labeler, LabelerSpec, options_of
from models.modalities.t5_caption import MAX_TOKENS


class T5Labeler(Labeler):
    """Writes "t5_caption": float16 [n, C], the encoder's last hidden state of each token.

    The caption of the list is read, or the one of a labeler where there is one. Longer captions
    are cut; an empty one is its end token alone.

    Options:
        max_tokens: Most tokens of a caption, its end included (77).
        tokenizer: Hub id or folder of the tokenizer, where the network's repository holds none
            that loads ("": the network's).

    Raises:
        ValueError: An option is unknown or out of its range.
    """

    reads: ClassVar[tuple[str, ...]] = ("caption",)
    compiles: ClassVar[bool] = True

    def __init__(self, spec: LabelerSpec) -> None:
        from transformers import AutoModelForTextEncoding, AutoTokenizer

        super().__init__(spec)
        options = options_of(spec, max_tokens=MAX_TOKENS, tokenizer="")
        self.max_tokens = options["max_tokens"]
        if not 1 <= self.max_tokens <= MAX_TOKENS:
            raise ValueError(f"max_tokens={self.max_tokens} of T5 captions: take 1 to {MAX_TOKENS}")
        words = options["tokenizer"]
        self.tokenizer = (
            AutoTokenizer.from_pretrained(words, trust_remote_code=False)
            if words
            else AutoTokenizer.from_pretrained(**self.pretrained())
        )
        self.model = self.compiled(self.place(self.load(AutoModelForTextEncoding)))

    def label_samples(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        return self.in_batches([sample["caption"] for sample in samples])

    def predict(self, images: Sequence[Any]) -> dict[str, list[Any]]:
        padding = "max_length" if self.spec.compile else "longest"
        inputs = self.tokenizer(
            list(images), truncation=True, max_length=self.max_tokens, padding=padding,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        hidden = self.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state
        limit = float(np.finfo(np.float16).max)
        values = hidden.float().clamp(-limit, limit).cpu().numpy().astype(np.float16)
        seen = inputs["attention_mask"].bool().cpu().numpy()
        return {"t5_caption": [value[mask] for value, mask in zip(values, seen, strict=True)]}
