"""Draw the masks for the docs: `python -m benchmarks.masks_page` writes docs/masks.md and docs/masks/*.png.

Draws each from the predicate that the kernels run and the tiles that they visit. Needs no GPU.
"""

import argparse
import struct
import zlib
from pathlib import Path

import torch

from kernels import masks
from kernels.masks import CAUSAL, Mask
from kernels.tile_lists import Pattern, tile_map

DOCS = Path(__file__).parents[1] / "docs"
T, TILE, PIXELS = 64, 8, 4
# Tile not visited; visited but hidden; visible in a partial tile; visible in a full tile; lines between tiles.
PALETTE = [(255, 255, 255), (253, 226, 193), (217, 95, 2), (44, 127, 184), (205, 205, 205)]

MASKS: dict[str, tuple[str, Mask]] = {
    "full": ("masks.FULL", masks.FULL),
    "causal": ("masks.CAUSAL", CAUSAL),
    "window": ("masks.sliding_window(12)", masks.sliding_window(12)),
    "window-and-sinks": (
        "CAUSAL & (sliding_window(12) | sink_tokens(3))",
        CAUSAL & (masks.sliding_window(12) | masks.sink_tokens(3)),
    ),
    "longformer": (
        "CAUSAL & (sliding_window(12) | global_tokens([0, 29]))",
        CAUSAL & (masks.sliding_window(12) | masks.global_tokens([0, 29])),
    ),
    "prefix": ("CAUSAL | prefix(lengths)  # here 20", CAUSAL | masks.prefix(torch.tensor([20], dtype=torch.int32))),
    "strided": ("CAUSAL & (sliding_window(9) | strided(9))", CAUSAL & (masks.sliding_window(9) | masks.strided(9))),
    "dilated": ("sliding_window(40) & strided(5)", masks.sliding_window(40) & masks.strided(5)),
    "bigbird": ("bigbird(10, 2, 1, seed=4, block=8)", masks.bigbird(10, 2, 1, seed=4, block=8)),
    "layout": (
        "CAUSAL & block_sparse(layout, 16)",
        CAUSAL & masks.block_sparse(torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]), 16),
    ),
}
DOCUMENTS = ("segment_ids  # documents of 20, 7 and 37 tokens", torch.tensor([[0] * 20 + [1] * 7 + [2] * 37]).int())


def picture(mask: Mask, segments: torch.Tensor | None = None) -> torch.Tensor:
    """Draw a mask as indices into the palette (rows, columns); queries go down, keys to the right."""
    pattern = Pattern(*mask.operands, segments, segments)
    needed, full = (
        tiles[0].repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        for tiles in tile_map(pattern, T, T, TILE, TILE, torch.device("cpu"))
    )
    seen = mask.dense(T, T)[0, 0]
    if segments is not None:
        seen = seen & (segments[0][:, None] == segments[0][None, :])
    cells = needed.int() + (seen & needed).int() + (seen & full).int()
    image = cells.repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)
    image[:: TILE * PIXELS] = len(PALETTE) - 1
    image[:, :: TILE * PIXELS] = len(PALETTE) - 1
    return image.to(torch.uint8)


def png(image: torch.Tensor) -> bytes:
    """Encode a palette PNG (https://www.w3.org/TR/png)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = image.shape
    rows = b"".join(b"\0" + bytes(row.tolist()) for row in image)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    palette = bytes(value for colour in PALETTE for value in colour)
    body = chunk(b"IHDR", header) + chunk(b"PLTE", palette) + chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def write(docs: Path) -> None:
    """Write docs/masks.md and its pictures."""
    (docs / "masks").mkdir(parents=True, exist_ok=True)
    lines = [
        "# Masks",
        "",
        f"{T} queries (down) by {T} keys (across), in tiles of {TILE}. `python -m benchmarks.masks_page` draws them",
        "from the predicates that the kernels run and the tiles that they visit. White tiles are never visited. In",
        "blue tiles every query sees every key, so they need no predicate. In the others, orange pairs are visible",
        "and beige ones are hidden.",
        "",
    ]
    pictures = {name: (code, picture(mask)) for name, (code, mask) in MASKS.items()}
    pictures["documents"] = DOCUMENTS[0], picture(CAUSAL, DOCUMENTS[1])
    for name, (code, image) in pictures.items():
        (docs / "masks" / f"{name}.png").write_bytes(png(image))
        lines += [f"`{code}`", "", f"![{name}](masks/{name}.png)", ""]
    (docs / "masks.md").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks_page", description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder to write to")
    write(parser.parse_args().docs)


if __name__ == "__main__":
    main()
