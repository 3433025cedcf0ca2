"""Write the trained parts as the diffusers folder that ships with the package: fp16, safetensors, about 30 MB.

python export.py --work WORK
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from art import read_subjects
from diffusers import DDIMScheduler, StableDiffusionPipeline
from train_unet import SCHEDULE, SHIPPED, Base, load_vae
from transformers import CLIPTokenizer


def build_pipeline(work: Path) -> StableDiffusionPipeline:
    """The averaged weights as a pipeline, fp32."""
    saved = torch.load(work / "unet.pt", weights_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    base = Base(tokenizer)
    base.load_state_dict(saved["model"])
    with torch.no_grad():
        for name, param in base.named_parameters():
            param.copy_(saved["ema"][name])
    vae = load_vae(work)
    vae.register_to_config(scaling_factor=saved["scaling_factor"])
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=base.captioner.encoder.eval(),
        tokenizer=tokenizer,
        unet=base.unet.eval(),
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    pipeline = build_pipeline(args.work).to(torch.float16)
    kept = {p.name: p.read_bytes() for p in args.out.glob("*") if p.name in ("README.md", "samples.png", "bars.json")}
    shutil.rmtree(args.out, ignore_errors=True)
    pipeline.save_pretrained(args.out, safe_serialization=True)
    for config in args.out.glob("*/config.json"):
        # Where this machine had the part that it went on from is nobody's business.
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (args.out / "subjects.txt").write_text("\n".join(read_subjects().values()), encoding="utf-8")
    for name, content in kept.items():
        (args.out / name).write_bytes(content)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out.name}: {size / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
