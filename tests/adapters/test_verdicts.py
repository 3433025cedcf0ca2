"""What `inspect` says diffusers will do with a file is what diffusers does, asked for a file of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sdlora.adapter_file import LoraPair
from sdlora.adapter_file.keys import text_module_path
from sdlora.adapter_tools import inspect_adapter
from sdlora.stack import AdapterStack
from tests.tiny import tiny_sd1

from .builders import (
    ATTENTION2,
    TEXT,
    attention_processor_tensors,
    difference,
    kohya_tensors,
    old_diffusers_tensors,
    peft_metadata,
    peft_tensors,
    predict,
    random_pairs,
    save,
)
from .golden.make import FOLDER, MAKERS

# peft's, about the alphas that it loses: what is asked here.
pytestmark = pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")

Case = tuple[dict[str, Tensor], Mapping[str, str] | None]
CONVOLUTIONS = ("conv1", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "proj_in")


def unet(targets: tuple[str, ...] | None = ATTENTION2, alpha: Any = 4.0, rank: int = 4) -> dict[str, LoraPair]:
    return random_pairs(tiny_sd1().unet, targets=targets, alpha=alpha, rank=rank)


def text(targets: tuple[str, ...] = TEXT, alpha: Any = 4.0) -> dict[str, LoraPair]:
    pairs = random_pairs(tiny_sd1().text_encoder, targets=targets, alpha=alpha)
    return {text_module_path(path): pair for path, pair in pairs.items()}


def kohya(unet: Mapping[str, LoraPair], text: Mapping[str, LoraPair] | None = None) -> Case:
    return kohya_tensors(unet) | kohya_tensors(text or {}, "lora_te_"), None


def old(text: Mapping[str, LoraPair], word: str) -> Case:
    tensors = old_diffusers_tensors(text, "text_encoder.")
    return old_diffusers_tensors(unet()) | {name.replace(".lora.", word): t for name, t in tensors.items()}, None


def one_for(ending: str) -> Callable[[str], float]:
    return lambda path: 1.0 if ending in path else 4.0


CASES: dict[str, tuple[Callable[[], Case], str]] = {
    "kohya": (lambda: kohya(unet(alpha=2.0)), "yes"),
    "alphas differ in attention": (lambda: kohya(unet(alpha=one_for("to_q"))), "wrong strength"),
    "alphas differ in feed-forward": (lambda: kohya(unet(("ff.net.0.proj", "ff.net.2"), one_for("proj"))), "yes"),
    "attention has the alpha of few": (lambda: kohya(unet(None, one_for("attn"))), "wrong strength"),
    "attention has the alpha of most": (lambda: kohya(unet() | unet(("proj_in",), 1.0)), "yes"),
    "ranks differ": (lambda: kohya(unet() | unet(("attn2.to_k",), rank=2)), "yes"),
    "convolutions": (lambda: kohya(unet() | unet(CONVOLUTIONS)), "yes"),
    "text": (lambda: kohya(unet(), text(alpha=2.0)), "yes"),
    "text alone": (lambda: kohya({}, text(alpha=2.0)), "yes"),
    "text without its output and feed-forward": (lambda: kohya(unet(), text(TEXT[:3])), "refuses"),
    "alphas differ in text attention": (lambda: kohya(unet(), text(alpha=one_for("q_proj"))), "wrong strength"),
    "alphas differ in text feed-forward": (lambda: kohya(unet(), text(alpha=one_for("fc1"))), "wrong strength"),
    "kohya with PEFT's header": (lambda: (kohya_tensors(unet()), peft_metadata(unet())), "refuses"),
    "PEFT": (lambda: (peft_tensors(unet(alpha=2.0)), peft_metadata(unet(alpha=2.0))), "yes"),
    "PEFT with a pattern": (
        lambda: (peft_tensors(unet(alpha=one_for("to_q"))), peft_metadata(unet(alpha=one_for("to_q")))),
        "yes",
    ),
    "PEFT without header": (lambda: (peft_tensors(unet()) | peft_tensors(text(), "text_encoder."), None), "yes"),
    "PEFT of a part alone": (lambda: (peft_tensors(unet(), "base_model.model."), None), "nothing"),
    "PEFT without prefix": (lambda: (peft_tensors(unet(), ""), None), "nothing"),
    "old": (lambda: (old_diffusers_tensors(unet()), None), "yes"),
    "old with text": (lambda: old(text(), ".lora_linear_layer."), "yes"),
    "old with text queries": (lambda: old(text(TEXT[:3]), ".lora_linear_layer."), "yes"),
    "old with text called as the U-Net": (lambda: old(text(), ".lora."), "refuses"),
    "attention processors": (lambda: (attention_processor_tensors(unet()), None), "nothing"),
}
FAST = ("text without its output and feed-forward", "alphas differ in text feed-forward", "PEFT of a part alone")
GOLDEN = {
    **dict.fromkeys(("loha", "lokr", "sd2_loha", "full_difference", "locon_with_middle"), "refuses"),
    **dict.fromkeys(("dora_by_row", "dora_by_column"), "wrong picture"),
    **dict.fromkeys(("peft_without_alpha", "attention_processors"), "nothing"),
    **dict.fromkeys(("peft_with_alpha", "peft_rslora"), "refuses"),  # their headers name no target modules
    "kohya_mixed_alphas": "wrong strength",
}


def what_diffusers_does(build: Callable[[], Any], path: Path) -> str:
    """In the words of `inspect`, of which "wrong" stands for both."""
    ours, theirs = build(), build()
    base = predict(ours)
    AdapterStack(ours).load(path)
    try:
        theirs.load_lora_weights(str(path))
    except (ValueError, KeyError):
        return "refuses"
    drawn = predict(theirs)
    if difference(drawn, base) == 0:
        return "nothing"
    assert difference(predict(ours), base) > 0.02
    return "yes" if difference(drawn, predict(ours)) < 2e-4 else "wrong"


def said_of(path: Path) -> str:
    return next(tool.loads for tool in inspect_adapter(path).tools if tool.tool == "diffusers")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_file_of_each_kind(tmp_path: Path, name: str) -> None:
    make, expected = CASES[name]
    path = save(tmp_path / "a.safetensors", *make())
    assert said_of(path) == expected
    assert what_diffusers_does(tiny_sd1, path) == expected.split()[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_the_golden_files(name: str) -> None:
    path, expected = FOLDER / f"{name}.safetensors", GOLDEN.get(name, "yes")
    assert said_of(path) == expected
    assert what_diffusers_does(MAKERS[name][0], path) == expected.split()[0]
