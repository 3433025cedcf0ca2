"""Makes `datasets/blob-emoji` and `datasets/high-contrast`: 40 captioned drawings each, and 40 held-out ones.

Run `python tools/make_datasets.py` with the `base` extra installed (npm fetches the two icon packages). The rule, so
that the choice is nobody's taste: the subjects of `KINDS`, shuffled by kind with a fixed seed; of each kind the first
`QUOTAS[kind]` are for training and the next as many are held out. Both sets get the same subjects.

`KINDS` lists what may be chosen: subjects the embedded base knows whose drawings, in both sets, show what the caption
says (no writing, no empty outlines), and only one of each family of near twins (one apple, one mouse), so that no
held-out subject has been seen in training under another name.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tools" / "embedded_base"))

from art import ADAPTATION_SETS, ArtSet, fetch, rasterise, read_subjects, svg_of  # noqa: E402

SIZE = 256
SEED = 1

KINDS = {
    "animals": """ant bat bear bird butterfly camel cat chipmunk cow crab crocodile deer dog dolphin dove dragon duck
        elephant ewe fish goat gorilla hatching-chick honeybee horse koala lady-beetle lion lizard monkey
        owl panda penguin pig rabbit rhinoceros rooster scorpion shark shrimp snail snake spider tiger
        turkey turtle unicorn whale wolf""",
    "food": """avocado banana beer-mug birthday-cake bread carrot cheese-wedge cherries cocktail-glass cookie croissant
        doughnut ear-of-corn french-fries grapes hamburger hot-dog hot-pepper lollipop meat-on-bone pear
        pineapple pizza popcorn soft-ice-cream spaghetti strawberry sushi taco tomato watermelon
        wine-glass""",
    "vehicles": """airplane ambulance automobile bicycle bus delivery-truck fire-engine helicopter kick-scooter
        locomotive motorcycle rocket sailboat satellite ship speedboat tractor""",
    "plants": """cactus cherry-blossom christmas-tree deciduous-tree evergreen-tree four-leaf-clover maple-leaf mushroom
        palm-tree seedling sunflower tulip""",
    "buildings": "castle church circus-tent factory ferris-wheel fountain house tent",
    "objects": """anchor backpack balance-scale balloon bell bomb bow-and-arrow briefcase camera candle crown dress drum
        envelope fire flashlight gear gem-stone ghost guitar hammer headphone high-heeled-shoe
        jack-o-lantern key kitchen-knife light-bulb locked megaphone microscope mobile-phone open-book
        pencil ring running-shoe saxophone scissors scroll shopping-cart skull snowman soccer-ball star
        telephone telescope television top-hat trophy trumpet umbrella violin wrapped-gift wrench""",
}
QUOTAS = {"animals": 12, "food": 8, "vehicles": 5, "plants": 4, "buildings": 2, "objects": 9}
"""Drawings of each kind in a half of 40."""


@dataclass(frozen=True)
class DatasetText:
    """What a dataset's README says of its art."""

    title: str
    look: str
    trigger: str
    author: str
    upstream: str
    licence_name: str


TEXTS = {
    "noto-v1": DatasetText(
        title="Blob emoji",
        look="The first Noto Emoji set: soft, rounded shapes in a small palette of flat colours, without outlines.",
        trigger="blob emoji style",
        author="Google Inc",
        upstream="https://github.com/googlefonts/noto-emoji",
        licence_name="Apache License 2.0",
    ),
    "fluent-emoji-high-contrast": DatasetText(
        title="High contrast",
        look="Fluent Emoji in its high-contrast form: black shapes and thick, even black strokes on white.",
        trigger="high contrast style",
        author="Microsoft Corporation",
        upstream="https://github.com/microsoft/fluentui-emoji",
        licence_name="MIT License",
    ),
}
FOLDERS = {"noto-v1": "blob-emoji", "fluent-emoji-high-contrast": "high-contrast"}


def choose_subjects() -> tuple[list[str], list[str]]:
    """The icon names of the training half and of the held-out half, each sorted."""
    train: list[str] = []
    heldout: list[str] = []
    for kind, names in KINDS.items():
        shuffled = sorted(names.split())
        random.Random(f"{SEED}-{kind}").shuffle(shuffled)
        quota = QUOTAS[kind]
        train += shuffled[:quota]
        heldout += shuffled[quota : 2 * quota]
    return sorted(train), sorted(heldout)


def remove_drawings(folder: Path) -> None:
    """Clear what an earlier run wrote; the LICENSE is written by hand and stays."""
    for pattern in ("*.png", "*.txt"):
        for file in folder.glob(pattern):
            file.unlink()
    if (folder / "heldout").exists():
        shutil.rmtree(folder / "heldout")


def write_half(icons: dict, names: list[str], folder: Path) -> None:
    captions = read_subjects()
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        svg = svg_of(icons, name)
        if svg is None:
            raise SystemExit(f"{name} has no drawing in {icons['prefix']}")
        rasterise(svg, SIZE).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(captions[name] + "\n", encoding="utf-8")


def readme(art_set: ArtSet, text: DatasetText, folder: str) -> str:
    return f"""# {text.title}

{text.look}

- 40 drawings for training in this folder, 40 of other subjects in `heldout/`: never train on those, they are for
  measuring.
- {SIZE} x {SIZE} pixels, RGB PNG on white. Each `NAME.png` has a caption in `NAME.txt`, which names the subject and not
  the style. Train with a trigger: `sdlora train datasets/{folder} --trigger "{text.trigger}"`.
- Subjects: animals, food, vehicles, plants, buildings and objects, chosen by a seeded rule; the embedded base model
  knows all of them in its own styles, and has never seen this style.

## Where the drawings come from

Made by {text.author}, <{text.upstream}>, under the {text.licence_name}
(see `LICENSE`). Taken from the npm package
`@iconify-json/{art_set.package}` {art_set.version} and changed only thus: the vector drawings were rasterised at {SIZE}
pixels on white by `tools/make_datasets.py`, which also chose the subjects and wrote the captions.
"""


def write_dataset(art_set: ArtSet, root: Path) -> None:
    text, folder = TEXTS[art_set.package], FOLDERS[art_set.package]
    target = root / folder
    remove_drawings(target)
    icons = fetch(art_set)
    train, heldout = choose_subjects()
    write_half(icons, train, target)
    write_half(icons, heldout, target / "heldout")
    (target / "README.md").write_text(readme(art_set, text, folder), encoding="utf-8")
    size = sum(file.stat().st_size for file in target.rglob("*.png"))
    print(f"{folder}: {len(train)} + {len(heldout)} drawings, {size / 2**20:.2f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the datasets of the repository.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "datasets", help="the datasets folder")
    root = parser.parse_args().out
    for art_set in ADAPTATION_SETS:
        write_dataset(art_set, root)


if __name__ == "__main__":
    main()
