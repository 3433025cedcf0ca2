"""The families' answers, compared with what diffusers' own pipelines do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdlora.errors import ModelError
from sdlora.families import PromptEmbeds, components_from_pipeline, detect_family
from tests.tiny import tiny_sd1, tiny_sd2, tiny_sdxl

TINY: dict[str, Callable[[], Any]] = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
PREDICTION = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}

# The widths and kinds of the published models, as their configuration files give them.
PUBLISHED = {
    "sd1": {"cross_attention_dim": 768, "in_channels": 4, "out_channels": 4},
    "sd2": {"cross_attention_dim": 1024, "in_channels": 4, "out_channels": 4, "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 2048,
        "in_channels": 4,
        "out_channels": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_family_is_read_from_the_unet(name: str) -> None:
    assert detect_family(PUBLISHED[name]).name == name
    assert detect_family(TINY[name]().unet.config).name == name


@pytest.mark.parametrize(
    "unet_config",
    [
        {**PUBLISHED["sd1"], "in_channels": 9},
        {**PUBLISHED["sd1"], "addition_embed_type": "image"},
        {**PUBLISHED["sd1"], "cross_attention_dim": None},
        {},
    ],
)
def test_other_kinds_of_models_are_refused(unet_config: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        detect_family(unet_config)


@pytest.mark.parametrize("name", TINY)
def test_captions_are_embedded_as_the_pipeline_does_it(name: str) -> None:
    pipeline = TINY[name]()
    components = components_from_pipeline(pipeline)
    captions = ["a fox", "x" * 200]
    embeds = components.family.encode_prompts(components, captions)
    reference = pipeline.encode_prompt(
        captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    assert torch.equal(embeds.encoder_hidden_states, reference[0])
    empty = components.family.encode_empty_prompt(components)
    assert torch.equal(empty.encoder_hidden_states, reference[1][:1])
    if name == "sdxl":
        assert embeds.pooled_prompt_embeds is not None and empty.pooled_prompt_embeds is not None
        assert torch.equal(embeds.pooled_prompt_embeds, reference[2])
        assert torch.equal(empty.pooled_prompt_embeds, reference[3][:1])
    else:
        assert embeds.pooled_prompt_embeds is None


def test_sdxl_without_forced_zeros_encodes_the_empty_prompt() -> None:
    pipeline = tiny_sdxl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    components = components_from_pipeline(pipeline)
    empty = components.family.encode_empty_prompt(components)
    assert empty.encoder_hidden_states.abs().sum() > 0
    encoded = components.family.encode_prompts(components, [""])
    assert torch.equal(empty.encoder_hidden_states, encoded.encoder_hidden_states)


def test_sdxl_conditions_on_sizes_in_the_pipelines_order() -> None:
    pipeline = tiny_sdxl()
    components = components_from_pipeline(pipeline)
    embeds = components.family.encode_prompts(components, ["a fox"])
    added = components.family.added_cond_kwargs(embeds, [(300, 400)], [(7, 0)], [(64, 128)])
    assert added is not None
    reference = pipeline._get_add_time_ids(
        (300, 400), (7, 0), (64, 128), dtype=torch.float32, text_encoder_projection_dim=32
    )
    assert torch.equal(added["time_ids"], reference)
    assert added["text_embeds"] is embeds.pooled_prompt_embeds


def test_odd_sizes_beyond_2048_are_exact() -> None:
    components = components_from_pipeline(tiny_sdxl())
    embeds = components.family.encode_prompts(components, ["a"]).to(dtype=torch.float16)
    added = components.family.added_cond_kwargs(embeds, [(4097, 3001)], [(0, 0)], [(64, 64)])
    assert added is not None
    assert added["time_ids"][0, :2].tolist() == [4097.0, 3001.0]


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_sd_has_no_added_conditions(name: str) -> None:
    components = components_from_pipeline(TINY[name]())
    embeds = components.family.encode_prompts(components, ["a"])
    assert components.family.added_cond_kwargs(embeds, [(64, 64)], [(0, 0)], [(64, 64)]) is None


@pytest.mark.parametrize("name", TINY)
def test_facts_are_read_from_the_model_and_not_asked_for(name: str) -> None:
    pipeline = TINY[name]()
    components = components_from_pipeline(pipeline)
    assert components.prediction_type == PREDICTION[name]
    assert components.default_resolution == 64
    assert components.size_step == (64 if name != "sdxl" else 32)
    assert torch.equal(components.noise_scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert not any(parameter.requires_grad for parameter in components.unet.parameters())


def test_zero_terminal_snr_is_taken_over() -> None:
    pipeline = tiny_sd2()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    assert components_from_pipeline(pipeline).noise_scheduler.alphas_cumprod[-1] < 1e-6


def test_rows_of_embeddings_can_be_chosen_repeated_and_joined() -> None:
    embeds = PromptEmbeds(torch.arange(6.0).reshape(3, 1, 2), torch.arange(3.0)[:, None])
    chosen = embeds.select([2, 0, 2])
    assert chosen.encoder_hidden_states[:, 0, 0].tolist() == [4.0, 0.0, 4.0]
    assert chosen.pooled_prompt_embeds is not None
    assert chosen.pooled_prompt_embeds[:, 0].tolist() == [2.0, 0.0, 2.0]
    assert len(PromptEmbeds.concat([embeds, chosen])) == 6
    assert embeds.is_finite()
    assert not PromptEmbeds(torch.tensor([[[float("inf")]]])).is_finite()
