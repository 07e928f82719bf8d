"""Objects as text and back: boxes, captions, metadata, palettes, poses, instances.

Every format but that of keypoints is the one of the released 4M sets, in words of the text
tokenizer: ordinary words and numbers `v0=0` ... `v3=999`. Writing is exact, and reading what was
written gives the object up to the format's steps. Reading is tolerant, for the text may come from
a model: what is incomplete is passed over, numbers out of range are clipped, and everything after
`[EOS]` is ignored.
"""

from tokenizers_vq.sequences.boxes import MIN_SCORE, det_to_string, string_to_det
from tokenizers_vq.sequences.captions import caption_to_string, string_to_caption
from tokenizers_vq.sequences.instances import sam_to_string, string_to_sam
from tokenizers_vq.sequences.keypoints import keypoints_to_string, string_to_keypoints
from tokenizers_vq.sequences.metadata import metadata_to_string, string_to_metadata
from tokenizers_vq.sequences.palette import palette_to_string, string_to_palette
from tokenizers_vq.sequences.poses import poses_to_string, string_to_poses

__all__ = [
    "MIN_SCORE",
    "caption_to_string",
    "det_to_string",
    "keypoints_to_string",
    "metadata_to_string",
    "palette_to_string",
    "poses_to_string",
    "sam_to_string",
    "string_to_caption",
    "string_to_det",
    "string_to_keypoints",
    "string_to_metadata",
    "string_to_palette",
    "string_to_poses",
    "string_to_sam",
]
