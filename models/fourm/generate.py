"""Values from values: any modalities of a trained 4M out of any others.

    generator = Generator(model, tokenizers, text)
    found = generator.generate({"rgb": images}, ["depth", "caption"], num_samples=10)
    found["depth"].values[0]      # ten samples averaged, float32 [H, W]

Modalities go by their names in the catalogue ("rgb", "depth", "det"), whatever the model's own
name for their tokens ("tok_depth@128").
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from infra.machine import fast_bf16
from models.fourm.batch import patchify
from models.fourm.decoding import Decoding, Drawn, Shown, as_condition, default_decoding, draw
from models.fourm.ensemble import Similarity, combine, word_overlap
from models.fourm.model import FourM
from models.fourm.spec import EOS_ID, ModalitySpec
from models.fourm.vectors import pad_vectors, valid_vectors
from tokenizers_vq.sequences import det_to_string

if TYPE_CHECKING:
    from tokenizers_vq.text import TextTokenizer
    from tokenizers_vq.tokenizer import Tokenizer

COORDINATES = 4


@dataclass(frozen=True)
class Generated:
    """What was generated for one target.

    Attributes:
        samples: A list a row, of its values one by one.
        values: One value a row: its samples combined, see `ensemble.combine`.
        tokens: uint16 or int64 [rows * samples, L], a row's samples behind one another.
        confidence: float32, of the same shape: the probability of each token.
    """

    samples: list[list[Any]]
    values: list[Any]
    tokens: np.ndarray
    confidence: np.ndarray


def base_name(name: str) -> str:
    """Catalogue name of a model's modality: "tok_depth@128" is "depth"."""
    return name.split("@")[0].removeprefix("tok_")


class Generator:
    """A trained model together with what turns its tokens into values.

    Args:
        model: The network; put in evaluation mode.
        tokenizers: A tokenizer for each modality of grids, by catalogue name.
        text: The tokenizer of captions and boxes.
        bf16: Whether to run in bf16; None does so where this machine is fast at it.
    """

    def __init__(
        self,
        model: FourM,
        tokenizers: Mapping[str, Tokenizer],
        text: TextTokenizer,
        bf16: bool | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizers = dict(tokenizers)
        self.text = text
        self.bf16 = fast_bf16() if bf16 is None else bf16

    @property
    def inputs(self) -> list[str]:
        """Modalities that conditions may be given in."""
        return sorted({base_name(spec.name) for spec in self.model.config.inputs})

    @property
    def targets(self) -> list[str]:
        """Modalities that can be generated."""
        return sorted({base_name(spec.name) for spec in self.model.config.targets})

    def spec(self, name: str, target: bool) -> ModalitySpec:
        """The model's modality behind a catalogue name; pixels rather than tokens as an input.

        Raises:
            ValueError: there is none; lists the choices.
        """
        specs = self.model.config.targets if target else self.model.config.inputs
        found = [spec for spec in specs if base_name(spec.name) == name]
        if not found:
            what, names = ("generated", self.targets) if target else ("an input", self.inputs)
            raise ValueError(f"{name!r} cannot be {what}; choose from {', '.join(names)}")
        return min(found, key=lambda spec: spec.kind != "pixels")

    def generate(
        self,
        conditions: Mapping[str, Sequence[Any]],
        targets: Sequence[str],
        *,
        settings: Mapping[str, Decoding] | None = None,
        num_samples: int = 1,
        seeds: Sequence[int] | None = None,
        chain: bool = True,
        batch_size: int = 64,
        similarity: Similarity = word_overlap,
    ) -> dict[str, Generated]:
        """Generates targets from conditions.

        Args:
            conditions: Values a modality, one a row; None where a row lacks it.
            targets: What to generate, in this order.
            settings: How to decode a target; the released sampler's settings where absent.
            num_samples: Samples a row, combined in `Generated.values`.
            seeds: One a row, by default its number. A row's result depends on its seed alone.
            chain: Whether a generated target is a condition of those after it.
            batch_size: Rows run together, samples included.
            similarity: Likeness of two captions, to choose among samples.

        Raises:
            ValueError: a modality that does not exist, conditions of unequal length, no target.
        """
        rows = _row_count(conditions, seeds)
        specs = [self.spec(name, target=True) for name in targets]
        if not specs:
            raise ValueError(f"nothing to generate; choose from {', '.join(self.targets)}")
        seeds = list(range(rows)) if seeds is None else list(seeds)
        step = max(1, batch_size // num_samples)
        parts = []
        for start in range(0, rows, step):
            chosen = slice(start, start + step)
            shown = self.show({name: values[chosen] for name, values in conditions.items()})
            own = seeds[chosen]
            parts.append(self._draw(shown, specs, settings or {}, own, num_samples, chain))
        drawn = {spec.name: _joined([part[spec.name] for part in parts]) for spec in specs}
        return {
            name: self._generated(spec, drawn[spec.name], num_samples, similarity)
            for name, spec in zip(targets, specs, strict=True)
        }

    def _draw(
        self, shown: dict[str, Shown], specs: Sequence[ModalitySpec],
        settings: Mapping[str, Decoding], seeds: list[int], copies: int, chain: bool,
    ) -> dict[str, Drawn]:  # fmt: skip
        drawn: dict[str, Drawn] = {}
        every = seeds
        for spec in specs:
            decoding = settings.get(base_name(spec.name)) or default_decoding(spec, list(shown))
            salt = zlib.crc32(spec.name.encode()) << 20
            with self.precision():
                found = draw(self.model, shown, spec.name, decoding, [s ^ salt for s in every],
                             copies=copies)  # fmt: skip
            drawn[spec.name] = found
            if chain and spec.is_input and spec is not specs[-1]:
                if copies > 1:
                    index = torch.arange(len(every)).repeat_interleave(copies)
                    shown = {k: v.rows(index.to(v.visible.device)) for k, v in shown.items()}
                    every = [s + (copy << 44) for s in every for copy in range(copies)]
                    copies = 1
                shown[spec.name] = as_condition(self.model.config, spec.name, found)
        return drawn

    def precision(self) -> Any:
        """The context in which the network runs: bf16 autocast, or nothing."""
        kind = self.model.mask_token.device.type
        return torch.autocast(kind, torch.bfloat16) if self.bf16 else nullcontext()

    def show(self, conditions: Mapping[str, Sequence[Any]]) -> dict[str, Shown]:
        """Values of conditions as the encoder takes them, by the model's own names."""
        shown = {}
        for name, values in conditions.items():
            spec = self.spec(name, target=False)
            present = torch.tensor([value is not None for value in values])
            if not bool(present.any()):
                continue
            some = next(value for value in values if value is not None)
            part = self.shown_as(spec, [some if value is None else value for value in values])
            part = Shown(part.values, part.visible & present.unsqueeze(1))
            device = self.model.mask_token.device
            shown[spec.name] = Shown(part.values.to(device), part.visible.to(device))
        return shown

    def shown_as(self, spec: ModalitySpec, values: Sequence[Any]) -> Shown:
        """Values as the tokens (or vectors) of one of the model's modalities, all visible.

        Raises:
            ValueError: their number is not the model's, or a tokenizer is missing.
        """
        if spec.kind == "seq":
            return self._shown_text(spec, values)
        if spec.kind == "pixels":
            vectors = torch.from_numpy(patchify(np.stack(values), spec.patch_size))
        elif spec.kind == "seq_emb":
            return self._shown_vectors(spec, values)
        else:
            vectors = torch.from_numpy(
                self._tokenizer(spec).encode_values(list(values)).astype(np.int64)
            )
        if vectors.shape[1] != spec.max_tokens:
            raise ValueError(
                f"{base_name(spec.name)} gives {vectors.shape[1]} tokens, the model takes "
                f"{spec.max_tokens}; resize the input to the model's resolution"
            )
        return Shown(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool))

    def _shown_text(self, spec: ModalitySpec, values: Sequence[Any]) -> Shown:
        texts = [v if isinstance(v, str) else det_to_string(v["instances"], bins=self.text.bins)
                 for v in values]  # fmt: skip
        ids = [[*line, EOS_ID][: spec.max_tokens] for line in self.text.encode_batch(texts)]
        table = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
        visible = torch.zeros(table.shape, dtype=torch.bool)
        for row, line in enumerate(ids):
            table[row, : len(line)] = torch.tensor(line)
            visible[row, : len(line)] = True
        return Shown(table, visible)

    @staticmethod
    def _shown_vectors(spec: ModalitySpec, values: Sequence[Any]) -> Shown:
        """Feature vectors [L, C], or `emb` with `mask_valid`, of any lengths."""
        vectors, length = pad_vectors(spec, [valid_vectors(value) for value in values])
        visible = np.arange(vectors.shape[1]) < length[:, None]
        return Shown(torch.from_numpy(vectors), torch.from_numpy(visible))

    def _tokenizer(self, spec: ModalitySpec) -> Tokenizer:
        name = base_name(spec.name)
        if name not in self.tokenizers:
            have = ", ".join(sorted(self.tokenizers)) or "none"
            raise ValueError(f"no tokenizer for {name!r}; there are {have}")
        return self.tokenizers[name]

    def _generated(
        self, spec: ModalitySpec, drawn: Drawn, copies: int, similarity: Similarity
    ) -> Generated:
        name, ids = base_name(spec.name), drawn.ids.cpu().numpy()
        confidence = drawn.confidence.float().cpu().numpy()
        if spec.kind == "seq":
            flat = self._texts(name, drawn, confidence)
        else:
            flat = self._tokenizer(spec).decode_tokens(ids)
        samples = [flat[i : i + copies] for i in range(0, len(flat), copies)]
        values = [combine(name, group, similarity) for group in samples]
        return Generated(samples, values, ids, confidence)

    def _texts(self, name: str, drawn: Drawn, confidence: np.ndarray) -> list[Any]:
        found: list[Any] = []
        for row, (ids, length) in enumerate(zip(drawn.ids.tolist(), drawn.lengths.tolist(),
                                                strict=True)):  # fmt: skip
            ids = ids[: int(length)]
            ids = ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids
            if name == "det":
                found.append({"instances": read_boxes(ids, confidence[row], self.text)})
            else:
                found.append(self.text.decode(ids))
        return found


def read_boxes(
    ids: Sequence[int], confidence: Sequence[float] | np.ndarray, text: TextTokenizer
) -> list[dict[str, Any]]:
    """Boxes in a token sequence, each scored by the geometric mean of its tokens' confidence.

    What is no complete, upright box is passed over.
    """
    first, bins = text.coordinate_id(0, 0), text.bins
    axis = [(i - first) // bins if first <= i < first + COORDINATES * bins else -1 for i in ids]
    boxes = []
    for start in range(len(ids) - COORDINATES):
        end = start + COORDINATES
        if axis[start:end] != list(range(COORDINATES)):
            continue
        stop = end
        while stop < len(ids) and axis[stop] < 0:
            stop += 1
        box = [(ids[start + k] - first - k * bins) / (bins - 1) for k in range(COORDINATES)]
        if stop == end or box[2] < box[0] or box[3] < box[1]:
            continue
        score = float(np.exp(np.mean(np.log(np.maximum(confidence[start:stop], 1e-9)))))
        name = text.decode(ids[end:stop]).strip()
        boxes.append({"box": box, "class_name": name, "score": score})
    return boxes


def _row_count(conditions: Mapping[str, Sequence[Any]], seeds: Sequence[int] | None) -> int:
    counts = {name: len(values) for name, values in conditions.items()}
    if seeds is not None:
        counts["seeds"] = len(seeds)
    if not counts or min(counts.values()) < 1:
        raise ValueError("generation needs at least one condition or seed")
    if len(set(counts.values())) > 1:
        raise ValueError(f"conditions must be of one length, not {counts}")
    return next(iter(counts.values()))


def _joined(parts: Sequence[Drawn]) -> Drawn:
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Drawn(cat("ids"), cat("confidence"), cat("lengths"))
