"""How good a tokenizer is: figures, the histogram of its codes, and pictures before and after.

    <tokenizer>/health.json      metrics, and how often each code occurs in the held-out samples
    <tokenizer>/sheet.jpg        before, after and difference; codes by how often they occur
    <run>/curve.jsonl, tensorboard/    the same metrics while it trained, the pictures at the end
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra import ui
from infra.store import Store
from models import modalities
from models.crops import CropBox

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from tasks.tokenizer_task import Network
    from tokenizers_vq.codec import ValueCodec
    from tokenizers_vq.tokenizer import Tokenizer

HEALTH, SHEET = "health.json", "sheet.jpg"
_SHOWN = 6
_CHART_HEIGHT = 120
_STRONGER = 4  # times that differences are shown


class HealthCheck:
    """Measures a network on held-out samples, and keeps the last outcome for pictures.

    Args:
        name: Modality.
        codec: The value contract.
        held_out: Values that training does not see.
        perceptual: A network that compares pictures, see `losses.Perceptual`; rgb only.
        side: Of the pictures that codes are made of, pixels, where what is decoded is as large as
            the held-out ones and that is larger; 0: theirs.
    """

    def __init__(
        self, name: str, codec: ValueCodec, held_out: list[np.ndarray],
        perceptual: nn.Module | None = None, side: int = 0,
    ) -> None:
        self.name, self.codec, self.held_out, self.side = name, codec, held_out, side
        self.perceptual = perceptual
        self.metrics: dict[str, float] = {}
        self.counts = np.zeros(0, np.int64)
        self._rows: list[tuple[str, list[np.ndarray]]] = []

    def __call__(self, net: Network) -> dict[str, float]:
        """Task metric of the reconstruction, code usage and perplexity; PSNR, SSIM and, where its
        weights are on this machine, LPIPS of pictures.

        Of ordered tokens also the task metric of their first 1, 2, 4, ...: `psnr@4`.
        """
        import torch

        from tokenizers_vq.quality import picture_quality, reconstruction_quality
        from tokenizers_vq.quantizers import code_statistics
        from tokenizers_vq.tokenizer import Tokenizer

        tokenizer = Tokenizer(self.name, net, self.codec)
        kind, given = self.codec.kind, self.held_out
        tokens = tokenizer.encode_values(self._seen())
        decoded = tokenizer.decode_tokens(tokens)
        metrics = reconstruction_quality(kind, decoded, given)
        if kind in ("rgb", "edge"):
            metrics |= picture_quality(decoded, given, self.perceptual)
        whole = torch.from_numpy(tokens.astype(np.int64))
        metrics |= code_statistics(whole, tokenizer.vocab_size)
        self._rows = [("before", given[:_SHOWN]), ("after", decoded[:_SHOWN])]
        if tokenizer.ordered:
            metrics |= self._prefixes(tokenizer, tokens)
        self.metrics = metrics
        self.counts = np.bincount(tokens.ravel(), minlength=tokenizer.vocab_size)
        return metrics

    def _seen(self) -> list[np.ndarray]:
        """The held-out values as the encoder takes them."""
        if not self.side:
            return self.held_out
        whole, crop = CropBox(0.0, 0.0, 1.0, 1.0), modalities.get(self.name).crop
        return [crop(value, whole, self.side) for value in self.held_out]

    def _prefixes(self, tokenizer: Tokenizer, tokens: np.ndarray) -> dict[str, float]:
        from tokenizers_vq.quality import reconstruction_quality

        found: dict[str, float] = {}
        for count in (2**i for i in range(int(tokens.shape[1] - 1).bit_length())):
            decoded = tokenizer.decode_tokens(tokens[:, :count])
            quality = reconstruction_quality(self.codec.kind, decoded, self.held_out)
            found |= {f"{name}@{count}": value for name, value in quality.items()}
            self._rows.append((f"first {count}", decoded[:_SHOWN]))
        return found

    def sheet(self) -> Image.Image:
        """Samples before and after, their difference, and the histogram of the codes."""
        from PIL import Image, ImageDraw

        rows = [[self._picture(value) for value in values] for _, values in self._rows]
        difference = [np.abs(a.astype(int) - b) * _STRONGER for a, b in zip(*rows[:2], strict=True)]
        rows.insert(2, [np.clip(each, 0, 255).astype(np.uint8) for each in difference])
        titles = [title for title, _ in self._rows]
        titles.insert(2, f"difference x {_STRONGER}")
        sheet = ui.contact_sheet(rows, row_titles=titles)
        chart = Image.fromarray(histogram_picture(self.counts, sheet.width))
        whole = Image.new("RGB", (sheet.width, sheet.height + chart.height), "white")
        whole.paste(sheet, (0, 0))
        whole.paste(chart, (0, sheet.height))
        used, codes = int((self.counts > 0).sum()), len(self.counts)
        text = f"{used:,} of {codes:,} codes are used; the most frequent first, heights in logs"
        ImageDraw.Draw(whole).text((whole.width // 3, sheet.height + 4), text, fill="black")
        return whole

    def _picture(self, value: np.ndarray) -> np.ndarray:
        modality = modalities.get(self.name)
        parts = modality.text.parts if modality.text else None
        return parts.show(value) if parts else modality.render(value)

    def publish(self, store: Store, path: str, run: str, step: int) -> None:
        """Writes figures and pictures beside the tokenizer and into its run."""
        buffer, sheet = io.BytesIO(), self.sheet()
        sheet.save(buffer, "JPEG", quality=90)
        store.write(f"{path}/{SHEET}", buffer.getvalue())
        store.write_json(
            f"{path}/{HEALTH}", {"metrics": self.metrics, "histogram": self.counts.tolist()}
        )
        self._write_events(store, run, step, np.asarray(sheet))

    def _write_events(self, store: Store, run: str, step: int, sheet: np.ndarray) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with tempfile.TemporaryDirectory(prefix="fourm-health-") as folder:
            with SummaryWriter(folder) as writer:
                writer.add_image("health/sheet", sheet, step, dataformats="HWC")
                codes = np.repeat(np.arange(len(self.counts)), self.counts)
                writer.add_histogram("health/codes", codes, step)
            for file in Path(folder).iterdir():
                store.write(f"{run}/tensorboard/{file.name}", file.read_bytes())


def histogram_picture(counts: np.ndarray, width: int) -> np.ndarray:
    """Codes from the most to the least frequent as bars uint8 [H, width, 3]; unused ones are red.

    The height is the logarithm of the count, full for the most frequent code.
    """
    height = _CHART_HEIGHT
    order = np.sort(counts)[::-1]
    # A column shows the code at its place: with more codes than columns, some of them.
    shown = order[np.arange(width) * len(order) // width] if len(order) else np.zeros(width)
    tall = np.log1p(shown) / max(float(np.log1p(order[:1].sum())), 1e-6) * (height - 16)
    rows = np.arange(height)[::-1, None]
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[rows < np.rint(tall)[None, :]] = (60, 110, 190)
    picture[:4, shown == 0] = picture[-4:, shown == 0] = (200, 40, 40)
    return picture


def show_health(store: Store, name: str, path: str) -> None:
    """A stored tokenizer's figures and sheet as one Markdown artifact of the Prefect run."""
    if not ui.in_run() or not store.exists(f"{path}/{HEALTH}"):
        return
    from PIL import Image

    metrics: dict[str, Any] = store.read_json(f"{path}/{HEALTH}")["metrics"]
    sheet = Image.open(io.BytesIO(store.read(f"{path}/{SHEET}")), formats=("JPEG",))
    lines = [f"## Tokenizer of {name}", "", "| metric | value |", "|---|---|"]
    lines += [f"| {key} | {value:.4g} |" for key, value in metrics.items()]
    lines += ["", f"![before, after, codes of {name}]({ui.data_uri(sheet)})"]
    ui.markdown(f"tokenizer-{name}", "\n".join(lines))
