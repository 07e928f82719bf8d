"""Edges of SAM instances: uint8 [H, W], 255 on the sharpest border of a mask, 0 off borders."""

from models.modalities._edges import edges

MODALITY = edges("sam_edge", "uint8 [H, W], strength of the borders of masks, 0..255")
