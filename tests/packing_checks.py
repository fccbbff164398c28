"""Token streams of documents, for the tests of packing."""

import numpy as np

DOCUMENT = 0
APART = ("documents", "best_fit")  # the packings that keep documents apart


def corpus(lengths: list[int], *, numbered: bool = True, headed: bool = True) -> np.ndarray:
    """Documents of so many tokens each, the document token included: 1, 2, 3, ... over the whole text, or random."""
    text = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
    if not numbered:
        text = np.random.default_rng(0).integers(1, 30, len(text)).astype(np.uint32)
    starts = np.cumsum([0, *lengths[:-1]])
    text[starts if headed else starts[1:]] = DOCUMENT
    return text


def lengths_of(n: int, seed: int = 0, most: int = 30) -> list[int]:
    return np.random.default_rng(seed).integers(1, most + 1, n).tolist()
