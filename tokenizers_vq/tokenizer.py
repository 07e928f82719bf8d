"""One interface to every learned tokenizer, and its files.

    <folder>/config.json          network, value contract, modality
    <folder>/model.safetensors    weights; those of released networks keep their published names

    tokenizer = load_tokenizer(store, "tokenizers/depth@1f2e3d4c")
    tokens = tokenizer.encode_values(depth_maps)     # uint16 [B, N]
    maps = tokenizer.decode_tokens(tokens)           # list of float32 [H, W] in 0..1
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.fitting import FittingBatches
from infra.machine import fast_bf16
from infra.strict import read_json, typed
from infra.weights import named, require_finite
from tokenizers_vq.codec import ValueCodec, Values
from tokenizers_vq.ordered import build_network
from tokenizers_vq.vqvae import VQVAE, VQConfig

if TYPE_CHECKING:
    from infra.store import Store
    from tokenizers_vq.released.network import ReleasedVQ

FORMAT, RELEASED_FORMAT = 1, 2
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_BATCH = 64


class Tokenizer:
    """A trained network with its value contract.

    Args:
        modality: Name of the modality whose values it takes.
        net: The network; put in evaluation mode.
        codec: The value contract.
        precision: `bf16`, `fp32`, or `auto`, which takes bf16 on devices that are fast at it.

    Raises:
        ValueError: if the vocabulary does not fit uint16.
    """

    def __init__(
        self, modality: str, net: VQVAE | ReleasedVQ, codec: ValueCodec, precision: str = "auto"
    ) -> None:
        if net.config.vocab_size > 1 << 16:
            raise ValueError(f"{modality}: {net.config.vocab_size} codes do not fit uint16 tokens")
        self.modality = modality
        self.net = net.eval()
        self.codec = codec
        self.batches = FittingBatches(_BATCH, f"tokenizer {modality}")
        self._decoding = FittingBatches(_BATCH, f"decoder of tokenizer {modality}")
        self._precision = precision

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return self.net.config.vocab_size

    @property
    def grid(self) -> int:
        """Tokens per side at the native size."""
        return self.net.config.grid

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample at the native size."""
        return self.net.config.num_tokens

    @property
    def ordered(self) -> bool:
        """Whether any first few tokens of a sample decode."""
        return bool(getattr(self.net.config, "registers", 0))

    @property
    def scaling_patch(self) -> int:
        """Pixels per token and side where a larger picture has more tokens, else 0."""
        fixed = self.ordered or self.codec.kind in ("feature", "vector", "mask")
        return 0 if fixed else self.net.config.patch

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.net.parameters()).device

    @property
    def bf16(self) -> bool:
        """Whether products take bf16 where the network lies."""
        auto = self._precision == "auto"
        return self._precision == "bf16" or (auto and fast_bf16(self.device.type))

    def to(self, device: str | torch.device) -> Tokenizer:
        """Moves the network; returns itself."""
        self.net.to(device)
        return self

    @contextmanager
    def _inference(self) -> Iterator[None]:
        kind = self.device.type
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=self.bf16):
            yield

    def pack(self, values: Values) -> NDArray[Any]:
        """Values to one packed array, which `encode_packed` takes; cheap to hand to a thread."""
        return np.stack([self.codec.pack(value) for value in values])

    def encode_packed(self, packed: NDArray[Any]) -> NDArray[np.uint16]:
        """Packed values [B, H, W(, C)] to row-major tokens uint16 [B, N].

        Raises:
            MemoryError: a single value is too large for the memory.
        """

        def encode(batch: NDArray[Any]) -> NDArray[np.uint16]:
            tokens = self.net.encode(self.codec.to_tensor(batch, self.device))
            return tokens.flatten(1).cpu().numpy().astype(np.uint16)

        with self._inference():
            return np.concatenate([tokens for _, tokens in self.batches(encode, packed)])

    def encode_values(self, values: Values) -> NDArray[np.uint16]:
        """Values of equal size, as the modality's `decode` gives them, to tokens [B, N].

        Raises:
            ValueError: a value is none of the modality, or they are not of one size that divides
                into patches.
        """
        for value in values:
            try:
                self.codec.check(value)
            except ValueError as error:
                raise ValueError(f"{self.modality} {error}") from None
        sizes, patch = sorted({np.shape(value) for value in values}), self.scaling_patch
        if len(sizes) > 1:
            raise ValueError(f"{self.modality}: values of one size are encoded together, not of "
                             f"{list(sizes[0])} and {list(sizes[1])}")  # fmt: skip
        if patch and any(side % patch for side in sizes[0][:2]):
            raise ValueError(f"{self.modality}: {list(sizes[0])} does not divide into patches of "
                             f"{patch}")  # fmt: skip
        return self.encode_packed(self.pack(values))

    def decode_output(self, tokens: NDArray[Any] | Tensor) -> Tensor:
        """Tokens [B, N] to the network's output float32 [B, C, H, W] (logits for classes).

        Raises:
            ValueError: if N forms no grid or a token is outside the vocabulary.
            MemoryError: a single sample is too large for the memory.
        """
        return torch.cat(list(self._outputs(tokens)))

    def _outputs(self, tokens: NDArray[Any] | Tensor) -> Iterator[Tensor]:
        """What `decode_output` gives, in parts that fit into memory."""
        ids = tokens if isinstance(tokens, Tensor) else np.asarray(tokens, dtype=np.int64)
        grid = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        try:
            shape = self.net.config.token_shape(grid.shape[1])
        except ValueError as error:
            raise ValueError(f"{self.modality}: {error}") from None
        if grid.numel() and not 0 <= int(grid.min()) <= int(grid.max()) < self.vocab_size:
            raise ValueError(f"{self.modality}: tokens must lie in 0..{self.vocab_size - 1}")

        def decode(part: Tensor) -> Tensor:
            with self._inference():
                return self.net.decode(part).float()

        for _, output in self._decoding(decode, grid.unflatten(1, shape)):
            yield output

    def decode_tokens(self, tokens: NDArray[Any] | Tensor) -> list[NDArray[Any]]:
        """Tokens [B, N] to values in the types of the modality table; raises as `decode_output`."""
        return [value for output in self._outputs(tokens)
                for value in self.codec.from_tensor(output)]  # fmt: skip

    def files(self) -> dict[str, bytes]:
        """The tokenizer as files, byte-identical for equal weights."""
        from safetensors.torch import save

        config = {
            "format": FORMAT if isinstance(self.net, VQVAE) else RELEASED_FORMAT,
            "modality": self.modality,
            "network": self.net.config.to_dict(),
            "codec": self.codec.to_dict(),
        }
        state = {name: value.cpu().contiguous() for name, value in self.net.state_dict().items()}
        return {
            CONFIG: json.dumps(config, indent=1, sort_keys=True).encode(),
            WEIGHTS: save(state),
        }

    def save(self, folder: str | Path) -> str:
        """Writes the files into a local folder and returns their fingerprint."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = self.files()
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        return fingerprint(files)


def fingerprint(files: dict[str, bytes]) -> str:
    """sha256 over names and contents, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}:{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return digest.hexdigest()


def from_files(files: dict[str, bytes], precision: str = "auto") -> Tokenizer:
    """A tokenizer from its two files.

    Raises:
        ValueError: if the format is unknown or the weights do not fit the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        config, weights = read_json(files[CONFIG]), load(files[WEIGHTS])
        form, modality = config["format"], config["modality"]
        network, codec = config["network"], ValueCodec.from_dict(config["codec"])
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"the files of a tokenizer are damaged: {why}") from error
    net: VQVAE | ReleasedVQ
    if form == RELEASED_FORMAT:
        from tokenizers_vq.released.checkpoint import build

        if not isinstance(network, dict) or not isinstance(network.get("published"), dict):
            raise ValueError(f"{modality}: the network of a released tokenizer is not told")
        width = network.get("head_width")
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"{modality}: head_width is {width!r:.80}")
        net = build(network["published"], weights, head_width=width)
    elif form == FORMAT:
        net = _filled(modality, typed(VQConfig, network, f"network of {modality}"), weights)
    else:
        raise ValueError(
            f"tokenizer format {form!r}; this version reads {FORMAT} and {RELEASED_FORMAT}"
        )
    return Tokenizer(modality, net, codec, precision)


def _filled(modality: str, config: VQConfig, weights: dict[str, Tensor]) -> VQVAE:
    """The network with its weights. One that they do not fit is never built, for it may be of any
    size."""
    try:
        if max(config.encoder_depth, config.decoder_depth) > len(weights):
            raise RuntimeError(f"{len(weights)} tensors for more blocks")
        with torch.device("meta"):
            wanted = build_network(config).state_dict()
        for name in sorted(wanted.keys() ^ weights.keys()):
            raise RuntimeError(f"{name} is {'missing' if name in wanted else 'surplus'}")
        for name, value in wanted.items():
            if value.shape != weights[name].shape:
                raise RuntimeError(f"{name} is {list(weights[name].shape)}, not "
                                   f"{list(value.shape)}")  # fmt: skip
        require_finite(weights, WEIGHTS)
        net = build_network(config)
        net.load_state_dict(weights)
    except (RuntimeError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{modality}: weights do not fit the config: {error}") from None
    return net


def load_tokenizer(
    source: Store | str | Path, path: str = "", precision: str = "auto"
) -> Tokenizer:
    """Loads from `path` of a store, or from a local folder.

    Raises:
        FileNotFoundError: if there is no tokenizer.
    """
    if isinstance(source, (str, Path)):
        folder: Path | str = Path(source) / path
        files = {name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    else:
        folder = source.full(path)
        files = {name: source.read(f"{path}/{name}") for name in (CONFIG, WEIGHTS)}
    with named(folder):
        return from_files(files, precision)
