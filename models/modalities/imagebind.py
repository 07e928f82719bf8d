"""Patch features of ImageBind, or of another network whose vectors are shared with text.

float16 [h, w, C], the last hidden state of the vision trunk without CLS.
"""

from models.modalities._features import grid

MODALITY = grid("imagebind", "float16 [h, w, C] patch features")
