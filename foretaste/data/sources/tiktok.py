"""TikTok with what its videos look and sound like, as multi-modal recommenders are measured on."""

import io

import numpy as np
import polars as pl
from scipy import sparse

from foretaste.data.sources.files import Files
from foretaste.data.sources.tables import Tables

_PARTS = {"trnMat": 0, "valMat": 1, "tstMat": 2}
_VECTORS = ("image", "audio")


def read_tiktok(files: Files) -> Tables:
    """Read three user-item matrices as parts 0, 1 and 2, sorted: no order is known.

    Items have an `image` and an `audio` vector of 128 numbers; the published text vectors are
    not among the files. The matrices are those of DiffMM's repository, saved again by
    `scipy.sparse.save_npz` from the pickles that they are there.

    Jiang et al., "DiffMM: Multi-Modal Diffusion Model for Recommendation", MM 2024,
    https://arxiv.org/abs/2406.11781
    """
    parts = [_events(files, f"{name}.derived.npz", code) for name, code in _PARTS.items()]
    vectors = {name: np.load(io.BytesIO(files.read(f"{name}_feat.npy"))) for name in _VECTORS}
    items = pl.DataFrame({"item": np.arange(len(vectors["image"]), dtype=np.int64)}).with_columns(
        pl.Series(name, value.astype(np.float32), dtype=pl.Array(pl.Float32, value.shape[1]))
        for name, value in vectors.items()
    )
    return Tables(events=pl.concat(parts).sort("part", "user", "item"), items=items)


def _events(files: Files, name: str, code: int) -> pl.DataFrame:
    matrix = sparse.load_npz(io.BytesIO(files.read(name))).tocoo()
    return pl.DataFrame(
        {"user": matrix.row.astype(np.int64), "item": matrix.col.astype(np.int64)}
    ).with_columns(part=pl.lit(code, dtype=pl.UInt8))
