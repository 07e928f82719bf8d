"""Values to discrete tokens and back: learned VQ tokenizers, WordPiece text, sequences.

    tokenizer = tokenizers_vq.load("EPFL-VILAB/4M_tokenizers_depth_8k_224-448")   # a local folder
    tokens = tokenizer.encode_values(depth_maps)                                  # [B, 196]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers_vq.tokenizer import Tokenizer

__all__ = ["load"]


def load(
    path: str | Path, *, modality: str | None = None, head_width: int = 64,
    precision: str = "fp32", ema: bool = False,
) -> Tokenizer:
    """Opens a released tokenizer checkpoint: VQ, VQ-VAE, DiVAE or VQ-ControlNet.

    Args:
        path: Local folder with `config.json` and `model.safetensors`, a `.safetensors` file that
            holds its configuration in the header or lies beside `config.json`, or the `.pth` file
            of a training. Nothing is unpickled but tensors.
        modality: What it tokenizes; by default what the path is named after.
        head_width: Channels per attention head, 64 in all released networks; no file tells it.
        precision: `bf16`, `fp32` or `auto`.
        ema: Takes the averaged weights of a `.pth` file.

    Returns:
        The tokenizer with the released value contract. `net.sampling` of a DiVAE holds steps,
        seed and guidance of its diffusion decoder. A VQ-ControlNet decodes to Stable Diffusion's
        side; where the checkpoint does not hold Stable Diffusion, it is taken from the folder or
        hub id that its configuration names as `sd_path`.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no Stable Diffusion where it is needed.
        ValueError: if its tensors do not make a network, naming them, or no modality is told.
    """
    from tokenizers_vq.released.contracts import load as load_released

    return load_released(
        path, modality=modality, head_width=head_width, precision=precision, ema=ema
    )
