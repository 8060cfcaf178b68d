"""Runs the script that docs/guides/pictures.md is and keeps each of its figures, by name, as a PNG in docs/pictures."""

import pathlib
import re

from matplotlib.figure import Figure
from PIL import Image

DOCS = pathlib.Path(__file__).parent


def main():
    page = (DOCS / "guides" / "pictures.md").read_text(encoding="utf-8")
    namespace = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)), namespace)
    for name, figure in namespace.items():
        if isinstance(figure, Figure):
            path = DOCS / "pictures" / f"{name}.png"
            figure.savefig(path, dpi=100)
            Image.open(path).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


if __name__ == "__main__":
    main()
