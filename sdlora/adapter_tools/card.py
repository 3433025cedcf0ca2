"""The model card of an adapter: README.md with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sdlora.adapter_file import AdapterMetadata, Family
from sdlora.adapter_tools.hashes import FileHashes

__all__ = ["CardPicture", "is_hub_id", "model_card"]

_LICENSE_ID = re.compile(
    r"apache-2\.0|mit|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.0|openrail(\+\+)?|(creativeml|bigscience)-openrail-m|"
    r"bsd(-[23]-clause)?|l?gpl-3\.0|agpl-3\.0|mpl-2\.0|unlicense|wtfpl|artistic-2\.0|unknown"
)
"""What the Hub calls licences; others are "other", with their name."""
_TITLES: dict[Family, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
}
_ROWS = (
    ("Images", "ss_num_train_images"),
    ("Exposures of each image", "ss_num_epochs"),
    ("Steps", "ss_steps"),
    ("Images a step", "ss_total_batch_size"),
    ("Learning rate", "ss_learning_rate"),
    ("Optimizer", "ss_optimizer"),
    ("Schedule", "ss_lr_scheduler"),
    ("Seed", "ss_seed"),
)


@dataclass(frozen=True)
class CardPicture:
    """A picture in the card: where it lies in the folder, and what was asked for, if that is known."""

    url: str
    prompt: str


def is_hub_id(name: str) -> bool:
    """Whether a base model is called as the Hub calls it, "owner/name"."""
    return re.fullmatch(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+", name) is not None


def model_card(
    metadata: AdapterMetadata,
    *,
    family: Family,
    file_name: str,
    rank: str,
    hashes: FileHashes,
    pictures: Sequence[CardPicture] = (),
) -> str:
    """The text of README.md. `metadata.license` must be given: it is for its owner to say, and for nobody to assume."""
    if metadata.license is None:
        raise ValueError("a card needs a licence")
    blocks = [_front_matter(metadata, family, pictures), f"# {metadata.title}"]
    blocks += [metadata.description] if metadata.description else []
    blocks += [_pictures(pictures)] if pictures else []
    blocks += [_use(metadata, family, file_name), _facts(metadata, family, rank), _hashes(hashes)]
    return "\n\n".join(blocks) + "\n"


def _front_matter(metadata: AdapterMetadata, family: Family, pictures: Sequence[CardPicture]) -> str:
    license_id = (metadata.license or "").lower()
    lines = ["---"]
    if _LICENSE_ID.fullmatch(license_id):
        lines.append(f"license: {license_id}")
    else:
        lines += ["license: other", f"license_name: {_text(metadata.license or '')}"]
    if is_hub_id(metadata.base_model):
        lines += [f"base_model: {_text(metadata.base_model)}", "base_model_relation: adapter"]
    tags = ["text-to-image", "stable-diffusion-xl" if family == "sdxl" else "stable-diffusion", "lora", "diffusers"]
    tags += ["template:sd-lora", *metadata.tags]
    lines += ["library_name: diffusers", "pipeline_tag: text-to-image", "tags:"]
    lines += [f"- {_text(tag)}" for tag in dict.fromkeys(tags)]
    if metadata.trigger_phrase:
        lines.append(f"instance_prompt: {_text(metadata.trigger_phrase)}")
    if pictures:
        lines.append("widget:")
        for picture in pictures:
            lines += [f"- text: {_text(picture.prompt or '-')}", "  output:", f"    url: {_text(picture.url)}"]
    return "\n".join([*lines, "---"])


def _text(value: str) -> str:
    """A YAML string: those of JSON are."""
    return json.dumps(value, ensure_ascii=False)


def _pictures(pictures: Sequence[CardPicture]) -> str:
    return "\n\n".join(f"![{_alt(picture.prompt)}]({picture.url})" for picture in pictures)


def _alt(prompt: str) -> str:
    return re.sub(r"[\[\]\n]", " ", prompt)


def _use(metadata: AdapterMetadata, family: Family, file_name: str) -> str:
    weight = metadata.recommended_weight or 1.0
    stem = file_name.removesuffix(".safetensors")
    prompt = f"{metadata.trigger_phrase}, a fox" if metadata.trigger_phrase else "a fox"
    pipeline = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    base = metadata.base_model if is_hub_id(metadata.base_model) else "..."
    trigger = [f"Trigger: `{metadata.trigger_phrase}`."] if metadata.trigger_phrase else []
    hint = [metadata.usage_hint] if metadata.usage_hint else []
    return "\n".join(
        [
            "## Use",
            "",
            " ".join([*trigger, f"Weight to begin with: {weight:g}.", *hint]),
            "",
            f"- A1111, Forge: `{prompt} <lora:{stem}:{weight:g}>`",
            f"- ComfyUI: Load LoRA with `{file_name}`, strength {weight:g}",
            f'- sdlora: `sdlora generate "{prompt}" --lora {file_name}:{weight:g}`',
            "- diffusers:",
            "",
            "```python",
            f"from diffusers import {pipeline}",
            "",
            f"pipeline = {pipeline}.from_pretrained({base!r})",
            f'pipeline.load_lora_weights(".", weight_name={file_name!r}, adapter_name="style")',
            f'pipeline.set_adapters("style", {weight:g})',
            f"image = pipeline({prompt!r}).images[0]",
            "```",
        ]
    )


def _facts(metadata: AdapterMetadata, family: Family, rank: str) -> str:
    rows = [("Base", f"{metadata.base_model} ({_TITLES[family]})"), ("Rank", rank)]
    if metadata.resolution is not None:
        rows.append(("Resolution", f"{metadata.resolution[1]} x {metadata.resolution[0]}"))
    rows += [(title, metadata.training[key]) for title, key in _ROWS if key in metadata.training]
    rows += [("Author", metadata.author)] if metadata.author else []
    rows += [("Licence", metadata.license or "")]
    table = "\n".join(f"| {title} | {value} |" for title, value in rows)
    return f"## Training\n\n| | |\n|---|---|\n{table}"


def _hashes(hashes: FileHashes) -> str:
    return (
        "## Hashes\n\n"
        f"SHA-256 `{hashes.sha256}`, AutoV2 `{hashes.auto_v2.upper()}`, AutoV3 `{hashes.auto_v3.upper()}` (of the "
        "tensors alone; it survives renaming and new metadata)."
    )
