"""The built-in data set: drawn scenes with five captions each, in an ordinary folder with an ordinary CSV.

It lets a first run train, score and caption within minutes and without a download. Nothing downstream knows
that the pictures are drawn: they are read the way a user's own are.
"""

from efficap.data.demo.splits import SPLIT_SIZES
from efficap.data.demo.writing import write_demo

__all__ = ["SPLIT_SIZES", "write_demo"]
