"""Texts to vectors by a sentence encoder on this machine.

sentence-transformers is an extra, imported inside the one function that needs it.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Float32

from foretaste.errors import ConfigError


def embed_texts(texts: list[str], encoder: str, *, batch_size: int) -> Float32[np.ndarray, "N W"]:
    """Return a vector of length 1 for each text.

    Args:
        texts: At least one.
        encoder: Folder or name of a sentence-transformers model that is on this machine; nothing
            is fetched.
        batch_size: Texts encoded at a time.

    Raises:
        ConfigError: The extra `text` is not installed, or there is no such encoder.
    """
    vectors = _load(encoder).encode(
        texts,
        batch_size=batch_size,
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=False,
    )
    return np.asarray(vectors, dtype=np.float32)


@lru_cache(maxsize=4)
def _load(encoder: str) -> Any:
    try:
        library = import_module("sentence_transformers")
    except ImportError as error:
        raise ConfigError(
            "a field of kind 'text' needs sentence-transformers: "
            "pip install 'foretaste[text]', or give the texts as vectors, kind = 'vector'"
        ) from error
    try:
        return library.SentenceTransformer(encoder, device="cpu", local_files_only=True)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"encoder {encoder!r} cannot be loaded ({reason}): give the folder of a "
            "sentence-transformers model that is on this machine"
        ) from error
