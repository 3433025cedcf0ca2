"""The settings: precedence, errors that help, and files that are read back as they were."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sdlora.config import TARGET_PRESETS, TrainConfig, config_reference, load_config, to_toml
from sdlora.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


def problems_of(path: Path | None, overrides: list[str]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return {problem.where: f"{problem.what} {problem.remedy}" for problem in caught.value.problems}


def problems_of_text(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return problems_of(path, [])


def test_a_dataset_folder_is_all_that_is_needed() -> None:
    config = load_config(None, ["data.path=pictures"])
    assert config.data.path == Path("pictures")
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (16, None, "cross-attention")
    assert (config.train.exposures, config.train.snr_gamma, config.train.max_grad_norm) == (100, 5.0, 1.0)


def test_a_run_without_dataset_says_so() -> None:
    assert "folder with the images" in problems_of(None, [])["data.path"]


def test_an_override_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('[data]\npath = "a"\n[lora]\nrank = 8\nalpha = 4\n[train]\nseed = 3\n', encoding="utf-8")
    config = load_config(path, ["lora.rank=32", "lora.alpha=none"])
    assert (config.lora.rank, config.lora.alpha, config.train.seed) == (32, None, 3)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.trigger=blob emoji style", "blob emoji style"),
        ('data.trigger="quoted"', "quoted"),
        ("data.trigger=3", "3"),
        ('data.trigger=a"b', 'a"b'),
        ("data.trigger=1\nrank = 2", "1\nrank = 2"),
    ],
)
def test_text_needs_no_quotes_on_the_command_line(override: str, value: str) -> None:
    assert load_config(None, ["data.path=x", override]).data.trigger == value


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    problems = problems_of_text(
        tmp_path,
        """
        learning_rate = 1e-4
        [data]
        path = "x"
        resolutoin = 512
        rank = 4
        [lora]
        rank = 0
        targets = "cross-atention"
        [train]
        batch_size = true
        seed = 1.5
        learning_rate = "fast"
        [model]
        precision = "fp61"
        learning_rte = 1
        [trian]
        """,
    )
    assert problems["learning_rate"] == "this setting belongs in train.learning_rate. "
    assert "did you mean 'resolution'?" in problems["data.resolutoin"]
    assert "belongs in lora.rank" in problems["data.rank"]
    assert "greater than or equal to 1 (got 0)" in problems["lora.rank"]
    assert "did you mean 'cross-attention'?" in problems["lora.targets"]
    assert "integer (got True)" in problems["train.batch_size"]
    assert "integer (got 1.5)" in problems["train.seed"]
    assert "number (got 'fast')" in problems["train.learning_rate"]
    assert "did you mean 'fp16'?" in problems["model.precision"]
    assert "did you mean 'train.learning_rate'?" in problems["model.learning_rte"]
    assert "did you mean 'train'?" in problems["trian"]
    assert len(problems) == 11


def test_rows_of_blocks_are_read_written_and_checked(tmp_path: Path) -> None:
    text = '[data]\npath = "x"\n[[lora.blocks]]\nmatch = "up_blocks.*"\nrank = 8\n[[lora.blocks]]\nmatch = "a\\"b"\n'
    problems = problems_of_text(tmp_path, f"{text}rank = -1\nalhpa = 2")
    assert "greater than or equal to 0 (got -1)" in problems["lora.blocks.1.rank"]
    assert "did you mean 'alpha'?" in problems["lora.blocks.1.alhpa"]
    path = tmp_path / "settings.toml"
    path.write_text(f"{text}rank = 0\nalpha = 2.5", encoding="utf-8")
    config = load_config(path)
    assert [(row.match, row.rank, row.alpha) for row in config.lora.blocks] == [
        ("up_blocks.*", 8, None),
        ('a"b', 0, 2.5),
    ]
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config
    row = '[{match = "mid_block.*", rank = 2}]'
    assert load_config(None, ["data.path=x", f"lora.blocks={row}"]).lora.blocks[0].rank == 2


def test_the_rendered_error_names_the_file_and_counts() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["data.path=x", "lora.rank=0"])
    assert str(caught.value) == ("1 problem in the settings:\n  lora.rank: must be greater than or equal to 1 (got 0).")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("override", ["rank", "=3", "lora.=3", ".rank=3"])
def test_a_malformed_override_is_quoted_back(override: str) -> None:
    assert "section.name=value" in problems_of(None, ["data.path=x", override])[f"--set {override}"]


def test_a_value_in_the_place_of_a_section_is_told(tmp_path: Path) -> None:
    assert "[lora]" in problems_of_text(tmp_path, 'lora = 3\n[data]\npath = "x"')["lora"]
    assert "not a section" in problems_of(None, ["lora=3", "lora.rank=4"])["--set lora.rank=4"]


@pytest.mark.parametrize("value", ["nan", "inf", "-1.0"])
def test_numbers_must_be_finite_and_in_range(value: str) -> None:
    assert "train.learning_rate" in problems_of(None, ["data.path=x", f"train.learning_rate={value}"])


def test_a_file_that_is_missing_or_no_toml_or_no_text_is_one_problem(tmp_path: Path) -> None:
    assert "no such file" in problems_of(tmp_path / "none.toml", [])[str(tmp_path / "none.toml")]
    assert "line 2" in problems_of_text(tmp_path, "[data]\npath = x")[str(tmp_path / "settings.toml")]
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"[data]\n\xff")
    assert "byte 7" in problems_of(binary, [])[str(binary)]


@pytest.mark.parametrize("name", ["../up", "a/b", "nul", "COM1.x", "", ".hidden", "dot.", "x" * 101, "a:b"])
def test_a_run_name_cannot_leave_its_folder(name: str) -> None:
    assert "output.name" in problems_of(None, ["data.path=x", f"output.name={name!r}"])


@pytest.mark.parametrize(("folder", "name"), [("my images", "my-images"), ("絵", "adapter"), ("nul", "adapter")])
def test_the_data_folder_gives_a_safe_name(folder: str, name: str) -> None:
    assert load_config(None, [f"data.path={folder}"]).run_name == name


def test_a_loaded_configuration_cannot_be_changed() -> None:
    config = load_config(None, ["data.path=x"])
    with pytest.raises(ValidationError):
        config.lora.rank = 3  # type: ignore[misc]


def test_the_background_is_a_colour() -> None:
    assert load_config(None, ["data.path=x", "data.background=#0a64ff"]).data.background_rgb == (10, 100, 255)
    assert "data.background" in problems_of(None, ["data.path=x", "data.background=white"])


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)


@settings(deadline=None)
@given(
    trigger=texts,
    folder=texts.filter(lambda text: "\0" not in text),
    rate=st.floats(min_value=1e-12, max_value=10),
    targets=st.one_of(st.sampled_from(TARGET_PRESETS), st.lists(texts, min_size=1, max_size=3).map(tuple)),
    prompts=st.lists(texts, max_size=2).map(tuple),
)
def test_a_configuration_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory,
    trigger: str,
    folder: str,
    rate: float,
    targets: str | tuple[str, ...],
    prompts: tuple[str, ...],
) -> None:
    config = TrainConfig.model_validate(
        {
            "data": {"path": folder, "trigger": trigger},
            "lora": {"targets": targets},
            "train": {"learning_rate": rate},
            "preview": {"prompts": prompts},
        }
    )
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_bytes(to_toml(config).encode("utf-8"))
    assert load_config(path) == config


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.lora.targets == "cross-attention"
    # What a file says is either a choice that differs from the default or meant to be seen: never ignored.
    assert tomllib.loads(path.read_text(encoding="utf-8"))["model"]["base"] == config.model.base


def test_there_is_a_configuration_for_each_family_and_for_a_cpu() -> None:
    names = {path.stem for path in (REPOSITORY / "configs").glob("*.toml")}
    assert names >= {"style_sd15", "style_sd21", "style_sdxl", "tiny_cpu"}


def test_the_reference_page_is_up_to_date() -> None:
    """Rewritten by: python -c "from sdlora.config import *; print(config_reference(), end='')" > docs/CONFIG.md"""
    assert (REPOSITORY / "docs" / "CONFIG.md").read_text(encoding="utf-8") == config_reference()


def test_every_setting_has_a_meaning_in_the_reference() -> None:
    for name, section in TrainConfig.model_fields.items():
        for setting, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, f"{name}.{setting} has no text under it"
            assert f"### `{name}.{setting}`" in config_reference()
