"""Measure the shipped base against its bars, and write its card: bars.json, samples.png, README.md beside the weights.

    python evaluate.py --work WORK

(a) VAE: reconstruction of styles it never saw. (b) subjects: is a generated picture nearest to its own true drawing?
(c) styles: is the style that was asked for the one that was drawn? Among the true drawings of its subject in the six
styles, is the asked one the nearest; and by its colours and frame alone, without knowing the subject?
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from art import ADAPTATION_SETS, BASE_SETS, HERE, ArtSet, read_subjects
from PIL import Image
from text import caption

from sdlora import embedded
from sdlora.demo import draw
from sdlora.fidelity import StyleClassifier, rgb_to_lab, subject_ranks, subject_topk
from sdlora.generation import Generator
from sdlora.sheet import write_sheet

NUM_SUBJECTS = 100
SUBJECT_STYLES = ("flat", "noto")
STYLE_SUBJECTS = 40
WHITE = 250


def drawings(work: Path, art_set: ArtSet) -> dict[str, Image.Image]:
    """Caption -> true drawing, for the subjects the base knows."""
    data = np.load(work / "art" / f"{art_set.package}.npz")
    rows = {name: row for row, name in enumerate(data["names"].tolist())}
    pixels = data["pixels"]
    return {text: Image.fromarray(pixels[rows[name]]) for name, text in read_subjects().items() if name in rows}


@torch.no_grad()
def measure_vae(generator: Generator, pictures: list[Image.Image]) -> dict[str, float]:
    """Mean PSNR in dB (peak 255) and mean CIELAB distance over the pixels that are not paper white."""
    psnr, colour = [], []
    for picture in pictures:
        truth = np.asarray(picture).astype(np.float32)
        x = torch.from_numpy(truth).permute(2, 0, 1)[None] / 127.5 - 1
        vae = generator.pipeline.vae
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample[0].clamp(-1, 1)
        again = ((y + 1) * 127.5).permute(1, 2, 0).numpy()
        psnr.append(10 * np.log10(255**2 / np.square(truth - again).mean()))
        inked = truth.min(-1) < WHITE
        lab = [np.asarray(rgb_to_lab(image / 255)) for image in (truth, again)]
        colour.append(np.linalg.norm(lab[0] - lab[1], axis=-1)[inked].mean())
    return {
        "psnr": round(float(np.mean(psnr)), 2),
        "lab_error": round(float(np.mean(colour)), 2),
        "pictures": len(psnr),
    }


def measure_subjects(generator: Generator, art: dict[str, dict[str, Image.Image]]) -> dict[str, float]:
    names = list(read_subjects().values())
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, NUM_SUBJECTS).round().astype(int)]
    top: dict[int, list[float]] = {1: [], 5: []}
    for style in SUBJECT_STYLES:
        subjects = [subject for subject in chosen if subject in art[style]]
        pictures = draw(generator, [caption(subject, style) for subject in subjects])
        truth = [art[style][subject] for subject in subjects]
        for k, shares in top.items():
            shares.append(subject_topk(pictures, truth, k=k))
    return {f"top{k}": round(float(np.mean(shares)), 3) for k, shares in top.items()}


def measure_styles(generator: Generator, art: dict[str, dict[str, Image.Image]]) -> dict[str, dict[str, float]]:
    common = [s for s in read_subjects().values() if all(s in pictures for pictures in art.values())]
    subjects = [common[i] for i in np.linspace(0, len(common) - 1, STYLE_SUBJECTS).round().astype(int)]
    drawn = {style: draw(generator, [caption(subject, style) for subject in subjects]) for style in art}
    nearest: dict[str, list[bool]] = {style: [] for style in art}
    for number, subject in enumerate(subjects):
        truth = [pictures[subject] for pictures in art.values()]
        ranks = subject_ranks([pictures[number] for pictures in drawn.values()], truth)
        for style, rank in zip(art, ranks, strict=True):
            nearest[style].append(rank == 1)
    classifier = StyleClassifier({style: list(pictures.values()) for style, pictures in art.items()})
    named = {style: [told == style for told in classifier.nearest_of(drawn[style])] for style in art}
    return {"among the subject's six": _shares(nearest), "by colours and frame": _shares(named)}


def _shares(hits: dict[str, list[bool]]) -> dict[str, float]:
    each = {style: round(float(np.mean(values)), 3) for style, values in hits.items()}
    return {"right": round(float(np.mean(list(each.values()))), 3), **each}


def write_samples(generator: Generator, path: Path) -> None:
    subjects = ("fox", "rocket", "car", "hamburger", "house", "fish")
    columns = {style: draw(generator, [caption(s, style) for s in subjects]) for style in embedded.STYLES}
    write_sheet({**columns, "no style": draw(generator, list(subjects))}, subjects, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--exposures", required=True, help="how often each drawing was seen by the U-Net, for the card")
    parser.add_argument("--card-only", action="store_true", help="samples and card from the bars measured before")
    args = parser.parse_args()
    generator = Generator.from_base("tiny", precision="fp32")
    path = embedded.path() / "bars.json"
    if not args.card_only:
        path.write_text(json.dumps(measure(generator, args.work), indent=1) + "\n", encoding="utf-8")
    bars = json.loads(path.read_text(encoding="utf-8"))
    print(json.dumps(bars, indent=1))
    write_card(bars, args.exposures)
    write_samples(generator, embedded.path() / "samples.png")


def measure(generator: Generator, work: Path) -> dict[str, object]:
    art = {art_set.style: drawings(work, art_set) for art_set in BASE_SETS}
    unseen = {s.package: list(drawings(work, s).values()) for s in ADAPTATION_SETS}
    return {
        "vae": {name: measure_vae(generator, pictures) for name, pictures in unseen.items()},
        "subjects": measure_subjects(generator, art),
        "styles": measure_styles(generator, art),
    }


def write_card(bars: dict, exposures: str) -> None:
    values = {
        "exposures": exposures,
        "psnr_blob": bars["vae"]["noto-v1"]["psnr"],
        "lab_blob": bars["vae"]["noto-v1"]["lab_error"],
        "psnr_contrast": bars["vae"]["fluent-emoji-high-contrast"]["psnr"],
        "lab_contrast": bars["vae"]["fluent-emoji-high-contrast"]["lab_error"],
        "top1": bars["subjects"]["top1"],
        "top5": bars["subjects"]["top5"],
        "styles": bars["styles"]["among the subject's six"]["right"],
        "styles_alone": bars["styles"]["by colours and frame"]["right"],
        "subjects": len(read_subjects()),
    }
    card = (HERE / "card.md").read_text(encoding="utf-8")
    (embedded.path() / "README.md").write_text(card.format(**values), encoding="utf-8")


if __name__ == "__main__":
    main()
