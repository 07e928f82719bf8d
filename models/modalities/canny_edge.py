"""Canny edges of the picture (Canny 1986): uint8 [H, W], 255 on an edge and 0 elsewhere.

Crops are resized bilinearly and hold values in between.
"""

from models.modalities._edges import edges

MODALITY = edges("canny_edge", "uint8 [H, W], 255 on an edge, 0 elsewhere")
