"""docs/masks.md: the committed page and pictures show the present masks."""

import struct
import zlib
from pathlib import Path

import pytest
import torch

from benchmarks import masks_page
from kernels import masks

DOCS = Path(__file__).parents[1] / "docs"


def pixels(data: bytes) -> torch.Tensor:
    """Read the pixels of a palette PNG without filters."""
    found, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        found[data[at + 4 : at + 8]] = data[at + 8 : at + 8 + length]
        at += 12 + length
    width, height = struct.unpack(">II", found[b"IHDR"][:8])
    rows = torch.tensor(list(zlib.decompress(found[b"IDAT"]))).view(height, width + 1)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:]


def test_the_page_is_up_to_date(tmp_path):
    masks_page.write(tmp_path)
    assert (tmp_path / "masks.md").read_text() == (DOCS / "masks.md").read_text()
    made = {path.name: pixels(path.read_bytes()) for path in (tmp_path / "masks").iterdir()}
    kept = {path.name: pixels(path.read_bytes()) for path in (DOCS / "masks").iterdir()}
    assert made.keys() == kept.keys() and len(made) == len(masks_page.MASKS) + 1
    for name, image in made.items():
        assert torch.equal(image, kept[name]), name


@pytest.mark.parametrize("name", masks_page.MASKS)
def test_a_picture_shows_the_mask(name):
    """A pixel is orange or blue exactly where the predicate is True."""
    mask = masks_page.MASKS[name][1]
    cells = masks_page.picture(mask)[1 :: masks_page.PIXELS, 1 :: masks_page.PIXELS]
    assert torch.equal(cells >= 2, mask.dense(masks_page.T, masks_page.T)[0, 0])


def test_different_masks_have_different_pictures():
    assert not torch.equal(masks_page.picture(masks.CAUSAL), masks_page.picture(masks.FULL))
