"""Procedural walls and cracks: a picture, a free English caption and the exact crack mask.

Everything is a function of the scene, the size and the seed. Lengths are in pixels, so a larger
picture shows more wall, not a larger one.
"""

from farm.painter.captions import caption
from farm.painter.paint import Painted, paint
from farm.painter.scene import Scene, sample_scene

__all__ = ["Painted", "Scene", "caption", "paint", "sample_scene"]
