"""The whole image in ImageBind, or in another network whose vectors are shared with text.

float16 [C]; see the labeler for which vector it is.
"""

from models.modalities._features import vector

MODALITY = vector("imagebind_global", "float16 [C], one vector of the whole image")
