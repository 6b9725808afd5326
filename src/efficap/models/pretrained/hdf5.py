"""The weights in an HDF5 file, as Keras and transformers' TensorFlow models save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficap.errors import InputError


def read_hdf5(file: Path) -> dict[str, NDArray[np.floating[Any]]]:
    """All float data sets of a file, of 64 bits at most, by their path in it, as in ``layer/layer/kernel:0``.

    Soft and external links are not followed, and values that lie in other files are not read.

    Raises:
        InputError: h5py is not installed, or the file is missing, damaged, or has data sets larger than itself.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{file} needs h5py to be read: pip install 'efficap[hdf5]'") from error
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    arrays: dict[str, NDArray[np.floating[Any]]] = {}
    left = file.stat().st_size  # a few bytes of HDF5 can declare terabytes of zeros

    def visit(path: str, found: object) -> None:
        nonlocal left
        if not isinstance(found, h5py.Dataset) or found.shape is None:
            return
        if found.dtype.kind != "f" or found.dtype.itemsize > 8:
            return
        left -= found.nbytes
        if left < 0:
            raise InputError(f"{file}: {path} {found.shape} is larger than the file; save it uncompressed")
        if found.external or found.is_virtual:
            raise InputError(f"{file}: {path} lies in another file; save it into one")
        arrays[path] = np.asarray(found[()], found.dtype.newbyteorder("="))

    try:
        with h5py.File(file, "r") as opened:
            opened.visititems(visit)  # by hard links alone
    except InputError:
        raise
    except Exception as error:  # h5py raises OSError, KeyError, RuntimeError and more for damaged files
        raise InputError(f"{file} is damaged or no HDF5 file ({error})") from error
    return arrays
