"""The modalities of the released models as specifications, for plans without any data."""

from __future__ import annotations

from models.fourm.spec import CHUNKS, ModalitySpec

TEXT_VOCAB = 30_000
PIXEL_PATCH = 16
SIZE = 224
"""Side of pictures where a name holds none, pixels."""
VOCABULARIES = {
    "tok_rgb": 16_384, "tok_depth": 8192, "tok_normal": 8192, "tok_semseg": 4096, "tok_clip": 8192,
    "tok_canny_edge": 8192, "tok_sam_edge": 8192, "tok_dinov2": 8192, "tok_imagebind": 8192,
    "tok_dinov2_global": 8192, "tok_imagebind_global": 8192,
}
"""Token ids of each grid."""
PATCHES = {"tok_dinov2": 14, "tok_imagebind": 14}
"""Side of what one token of a grid stands for, pixels, where it is not 16."""
GLOBAL_TOKENS = 16
T5_WIDTH = 4096
SEQUENCES = ("caption", "det", "metadata", "human_poses", "color_palette", "sam_instance")


def is_global(name: str) -> bool:
    """Whether tokens describe the picture as a whole, without a grid of positions."""
    return name.split("@")[0].endswith("_global")


def sequence_spec(name: str, vocab_size: int, longest: int | None = None) -> ModalitySpec:
    """Specification of text: as long as released, or `longest` tokens."""
    from models.fourm.checkpoint import RELEASED_LENGTHS

    tokens, limit = RELEASED_LENGTHS.get(name, (256, 256))
    if longest is not None:
        tokens = limit = longest
    return ModalitySpec(name=name, kind="seq", vocab_size=vocab_size, max_tokens=tokens,
                        max_length=0 if limit == tokens else limit, chunk=CHUNKS.get(name, 0))


def t5_spec(
    name: str = "t5_caption", width: int = T5_WIDTH, longest: int | None = None
) -> ModalitySpec:
    """Specification of T5's vectors of a caption: as many as released, or at most `longest`."""
    from models.fourm.checkpoint import RELEASED_LENGTHS

    return ModalitySpec(name=name, kind="seq_emb", channels=width, is_target=False,
                        max_tokens=longest or RELEASED_LENGTHS["t5_caption"][0])


def grid_spec(
    name: str, size: int, vocab_size: int, tokens: int, *, ordered: bool = False
) -> ModalitySpec:
    """Specification of tokens of pictures with a side of `size` pixels; `ordered` ones stand in no
    grid."""
    if is_global(name):
        return ModalitySpec(name=name, kind="img", vocab_size=vocab_size, max_tokens=tokens,
                            learned_positions=True)
    return ModalitySpec(name=f"{name}@{size}", kind="img", vocab_size=vocab_size,
                        max_tokens=tokens, learned_positions=ordered)


def pixels_spec(name: str, size: int) -> ModalitySpec:
    """Specification of patches of pictures with a side of `size` pixels."""
    return ModalitySpec(name=f"{name}@{size}", kind="pixels", patch_size=PIXEL_PATCH,
                        max_tokens=(size // PIXEL_PATCH) ** 2, is_target=False)


def released_spec(name: str, size: int = SIZE) -> ModalitySpec:
    """Specification of the modality `name`, "tok_depth" or "tok_depth@448".

    Raises:
        ValueError: no released model has it; lists the choices.
    """
    base, _, given = name.partition("@")
    size = int(given) if given.isdigit() else size
    if base == "rgb":
        return pixels_spec(base, size)
    if base == "t5_caption":
        return t5_spec(base)
    if base in SEQUENCES:
        return sequence_spec(base, TEXT_VOCAB)
    if base not in VOCABULARIES:
        known = ", ".join(sorted({"rgb", "t5_caption", *SEQUENCES, *VOCABULARIES}))
        raise ValueError(f"no released model has the modality {name!r}; choose from {known}")
    tokens = GLOBAL_TOKENS if is_global(base) else (size // PATCHES.get(base, PIXEL_PATCH)) ** 2
    return grid_spec(base, size, VOCABULARIES[base], tokens)
