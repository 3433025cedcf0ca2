"""The art the embedded base is trained on: parallel icon sets from npm, rasterised on white.

Run `python art.py --out WORK` once; it fetches each `@iconify-json/NAME` package with the npm client and writes
`WORK/art/NAME.npz` with `pixels` [N, 128, 128, 3] uint8 and `names` [N]. Nothing here needs torch.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

HERE = Path(__file__).parent
SIZE = 128


@dataclass(frozen=True)
class ArtSet:
    """One icon set: the npm package, the version used, and the style's name in captions."""

    package: str
    version: str
    style: str


BASE_SETS = (
    ArtSet("noto", "1.2.9", "noto"),
    ArtSet("fluent-emoji-flat", "1.2.6", "flat"),
    ArtSet("fluent-emoji", "1.2.7", "gradient"),
    ArtSet("twemoji", "1.2.5", "twemoji"),
    ArtSet("emojione", "1.2.3", "emojione"),
    ArtSet("emojione-monotone", "1.2.1", "monotone"),
)
"""The only sets the base ever sees."""

ADAPTATION_SETS = (
    ArtSet("noto-v1", "1.2.5", "blob emoji"),
    ArtSet("fluent-emoji-high-contrast", "1.2.6", "high contrast"),
)
"""Held out for style adapters; the base must never be trained on these."""


def read_subjects() -> dict[str, str]:
    """Icon name -> plain caption, in file order."""
    lines = (HERE / "subjects.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" = ") for line in lines if line and not line.startswith("#"))
    return {pair[0]: pair[1] if len(pair) == 2 else pair[0].replace("-", " ") for pair in pairs}


def fetch(art_set: ArtSet) -> dict:
    """The package's icons.json, fetched with `npm pack`."""
    with tempfile.TemporaryDirectory() as folder:
        spec = f"@iconify-json/{art_set.package}@{art_set.version}"
        subprocess.run(["npm", "pack", spec], cwd=folder, check=True, capture_output=True)
        archive = next(Path(folder).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            return json.load(member)


def svg_of(icons: dict, name: str) -> str | None:
    """A standalone SVG for one icon, aliases followed; None for icons with transforms or missing parents."""
    alias = icons.get("aliases", {}).get(name)
    if alias is not None:
        if set(alias) - {"parent", "hidden"}:
            return None
        return svg_of(icons, alias["parent"])
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    body = icon["body"].replace("currentColor", "#000000")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def rasterise(svg: str, size: int = SIZE) -> Image.Image:
    """RGB picture on white, drawn at twice the size and reduced, so that edges are smooth."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size * 2, height=size * 2)
    rgba = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (size * 2, size * 2), (255, 255, 255, 255))
    square.alpha_composite(rgba, ((size * 2 - rgba.width) // 2, (size * 2 - rgba.height) // 2))
    return square.convert("RGB").resize((size, size), Image.Resampling.BOX)


def write_set(art_set: ArtSet, folder: Path) -> None:
    icons = fetch(art_set)
    names, pixels = [], []
    for name in sorted(set(icons["icons"]) | set(icons.get("aliases", {}))):
        if "skin-tone" in name or icons["icons"].get(name, {}).get("hidden"):
            continue
        svg = svg_of(icons, name)
        if svg is None:
            continue
        names.append(name)
        pixels.append(np.asarray(rasterise(svg)))
    np.savez_compressed(folder / f"{art_set.package}.npz", pixels=np.stack(pixels), names=np.array(names))
    print(f"{art_set.package}: {len(names)} drawings", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the working folder")
    folder = parser.parse_args().out / "art"
    folder.mkdir(parents=True, exist_ok=True)
    for art_set in BASE_SETS + ADAPTATION_SETS:
        if not (folder / f"{art_set.package}.npz").exists():
            write_set(art_set, folder)


if __name__ == "__main__":
    main()
