"""Cut photographs into tiles: images of one's own for docs/your_images.md, one class folder per photograph.

    pip install scikit-image
    python docs/examples/photograph_tiles.py FOLDER

The twelve photographs come with scikit-image (public domain or CC0, named in `skimage.data`) and scikit-learn (china.jpg by
danielbuechele and flower.jpg by vultilion, CC BY 2.0).
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TILE_PX = 64
MOST_TILES = 80
"""Of a photograph, evenly spread."""


def photographs() -> dict[str, Any]:
    """Return the photographs by name, [H, W, 3] or [H, W] uint8."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    names = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "hubble_deep_field", "retina", "rocket")
    found = {name: getattr(data, name)() for name in (*names, "immunohistochemistry")}
    return found | {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}


def cut(folder: Path) -> int:
    """Write the tiles, which do not overlap; return their number."""
    count = 0
    for name, pixels in photographs().items():
        image = Image.fromarray(pixels).convert("RGB")
        lefts, tops = range(0, image.width - TILE_PX + 1, TILE_PX), range(0, image.height - TILE_PX + 1, TILE_PX)
        places = [(left, top) for top in tops for left in lefts]
        chosen = np.linspace(0, len(places) - 1, min(MOST_TILES, len(places))).astype(int)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for left, top in (places[index] for index in chosen.tolist()):
            tile = image.crop((left, top, left + TILE_PX, top + TILE_PX))
            tile.save(folder / name / f"{top:04}-{left:04}.png")
        count += len(chosen)
    return count


if __name__ == "__main__":
    print(f"{cut(Path(sys.argv[1]))} tiles of {TILE_PX} px in {sys.argv[1]}")
