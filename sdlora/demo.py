"""`sdlora demo`: the whole job on the embedded base, in minutes, with a sheet that shows it.

Trains one adapter on each of the two datasets of the repository, draws held-out subjects without, with each, with both
and after unloading, measures whether the styles arrived, and writes the two adapters, the sheet and a page.
"""

from __future__ import annotations

import base64
import io
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from sdlora import embedded
from sdlora.config import load_config
from sdlora.data.dataset import scan_dataset
from sdlora.errors import DatasetError, Problem, SdloraError
from sdlora.fidelity import style_gap_closed
from sdlora.generation import Generator
from sdlora.progress import terminal_progress
from sdlora.request import GenerationRequest
from sdlora.sheet import write_sheet
from sdlora.training import train_adapter

__all__ = ["DemoStyle", "StyleResult", "find_datasets", "run_demo"]

SHEET_PROMPTS = 8
HELD_OUT = 40
STACK_WEIGHTS = (0.7, 0.5)
SEED = 7


@dataclass(frozen=True)
class DemoStyle:
    """One dataset of the repository and the phrase that calls its style."""

    folder: str
    trigger: str


STYLES = (DemoStyle("blob-emoji", "blob emoji style"), DemoStyle("high-contrast", "high contrast style"))


@dataclass(frozen=True)
class StyleResult:
    """What came of one style."""

    style: DemoStyle
    path: Path
    seconds: float
    gap_closed: float

    @property
    def kilobytes(self) -> float:
        return self.path.stat().st_size / 1024


def find_datasets() -> Path:
    """The repository's `datasets` folder: below the current folder, or beside an editable install.

    Raises:
        DatasetError: neither is there.
    """
    for root in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if all((root / "datasets" / style.folder).is_dir() for style in STYLES):
            return root / "datasets"
    problem = Problem("datasets", "the demo's images are not here.", "Run `sdlora demo` in a clone of the repository.")
    raise DatasetError(Path.cwd(), [problem])


def held_out_drawings(dataset: Path) -> dict[str, Image.Image]:
    """Subject -> its true drawing in this style, for the subjects that are never trained on."""
    examples = scan_dataset(dataset / "heldout").examples[:HELD_OUT]
    pictures: dict[str, Image.Image] = {}
    for example in examples:
        with Image.open(example.path) as image:
            pictures[str(example.caption)] = image.convert("RGB")
    return pictures


def run_demo(out_dir: Path, *, say: Callable[[str], None], exposures: int | None = None) -> None:
    """Do the whole job and write NAME.safetensors for each style, sheet.png and index.html into `out_dir`.

    Raises:
        DatasetError: the repository's datasets cannot be found.
        SdloraError: unloading did not give the base back (it always must).
    """
    started = time.monotonic()
    datasets = find_datasets()
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = {style: _train(style, datasets, out_dir, exposures, say) for style in STYLES}
    say("Drawing subjects that were held out ...")
    generator = Generator.from_base("tiny", precision="fp32")
    before = generator.stack.base_checksum()
    drawings = {style: held_out_drawings(datasets / style.folder) for style in STYLES}
    subjects = list(drawings[STYLES[0]])
    results = []
    for style in STYLES:
        say(f"  {2 * len(subjects)} pictures without and with {paths[style][0].name}")
        prompts = [f"{subject}, {style.trigger}" for subject in subjects]
        without = draw(generator, prompts)
        name = generator.stack.load(paths[style][0])
        generator.stack.set_adapters(name, 1.0)
        gap = style_gap_closed(draw(generator, prompts), without, list(drawings[style].values()))
        generator.stack.unload()
        results.append(StyleResult(style, *paths[style], gap))
    say("  the sheet: without, with each, with both, and after unloading")
    columns = sheet_columns(generator, paths, _sheet_subjects(subjects))
    identical = columns["base"] == columns["after unload"]
    after = generator.stack.base_checksum()
    if after != before or not identical:
        raise SdloraError("After unloading, the base is not what it was. Please report this.")
    write_sheet(columns, _sheet_subjects(subjects), out_dir / "sheet.png")
    minutes = (time.monotonic() - started) / 60
    _write_page(out_dir, results, before, minutes)
    for result in results:
        say(
            f"{result.style.folder}: {result.gap_closed:.0%} of the style gap closed on {len(subjects)} subjects never "
            f"trained on; {result.path.name} has {result.kilobytes:.0f} kB; trained in {result.seconds:.0f} s."
        )
    say(f"Base after unloading: identical, sha256 {after[:16]} before and after.")
    say(f"Look at {out_dir / 'sheet.png'} or {out_dir / 'index.html'}. Took {minutes:.1f} minutes.")


def _train(
    style: DemoStyle, datasets: Path, out_dir: Path, exposures: int | None, say: Callable[[str], None]
) -> tuple[Path, float]:
    started = time.monotonic()
    say(f"Training {style.trigger!r} on {datasets / style.folder} ...")
    settings = {
        "data.path": str(datasets / style.folder),
        "data.trigger": style.trigger,
        "model.base": "tiny",
        "output.dir": str(out_dir / "runs"),
        "output.name": style.folder,
        **({"train.exposures": exposures} if exposures else {}),
    }
    config = load_config(None, [*embedded.TRAINING, *(f"{key}={value!r}" for key, value in settings.items())])
    with terminal_progress(sys.stderr) as progress:
        trained = train_adapter(config, observers=[progress], say=say)
    target = out_dir / f"{style.folder}.safetensors"
    shutil.copyfile(trained, target)
    return target, time.monotonic() - started


def draw(generator: Generator, prompts: Sequence[str], *, seed: int = SEED, batch_size: int = 8) -> list[Image.Image]:
    """One picture a prompt, all from the noise of `seed`, with the embedded base's own steps and guidance."""
    request = GenerationRequest(
        prompt="",
        num_inference_steps=embedded.NUM_INFERENCE_STEPS,
        guidance_scale=embedded.GUIDANCE_SCALE,
        batch_size=batch_size,
    )
    return [picture.image for picture in generator.draw_many(prompts, [seed] * len(prompts), request)]


def sheet_columns(
    generator: Generator, paths: dict[DemoStyle, tuple[Path, float]], subjects: Sequence[str]
) -> dict[str, list[Image.Image]]:
    """Heading -> one picture a subject: base, each style, both, and the base again after unloading."""
    stack = generator.stack
    columns = {"base": draw(generator, subjects)}
    names = []
    for style, (path, _) in paths.items():
        names.append(stack.load(path))
        stack.set_adapters(names[-1], 1.0)
        columns[style.folder] = draw(generator, [f"{subject}, {style.trigger}" for subject in subjects])
    stack.set_adapters(names, list(STACK_WEIGHTS))
    both = ", ".join(style.trigger for style in paths)
    heading = "both " + " / ".join(f"{weight:g}" for weight in STACK_WEIGHTS)
    columns[heading] = draw(generator, [f"{subject}, {both}" for subject in subjects])
    stack.unload()
    columns["after unload"] = draw(generator, subjects)
    return columns


def _sheet_subjects(subjects: Sequence[str]) -> list[str]:
    every = max(1, len(subjects) // SHEET_PROMPTS)
    return list(subjects[::every][:SHEET_PROMPTS])


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sdlora demo</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
img{max-width:100%}td,th{padding:.2rem 1rem .2rem 0;text-align:left}</style>
<h1>Two styles, one base</h1>
<p>Each style was trained on 40 drawings. The rows are subjects that were not among them. The last column is drawn after
both adapters were unloaded: it is the first one again, to the last bit.</p>
<img src="data:image/png;base64,{{ sheet }}" alt="Subjects by base, each style, both, and after unloading">
<table>
<tr><th>style</th><th>trigger</th><th>file</th><th>size</th><th>gap closed</th><th>training</th></tr>
{% for r in results %}<tr>
<td>{{ r.style.folder }}</td><td>{{ r.style.trigger }}</td>
<td><a href="{{ r.path.name }}">{{ r.path.name }}</a></td><td>{{ "%.0f"|format(r.kilobytes) }} kB</td>
<td>{{ "%.0f"|format(100 * r.gap_closed) }} %</td><td>{{ "%.0f"|format(r.seconds) }} s</td>
</tr>{% endfor %}
</table>
<p>Gap closed: how much nearer to the true drawings of the style the pictures are with the adapter than without,
1 &minus; d(with) / d(without). Checksum of the base before and after: <code>{{ checksum[:16] }}</code>.
All of it took {{ "%.1f"|format(minutes) }} minutes.</p>
</html>
"""


def _write_page(out_dir: Path, results: Sequence[StyleResult], checksum: str, minutes: float) -> None:
    buffer = io.BytesIO()
    with Image.open(out_dir / "sheet.png") as sheet:
        sheet.save(buffer, format="PNG", optimize=True)
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        results=results, checksum=checksum, minutes=minutes, sheet=base64.b64encode(buffer.getvalue()).decode()
    )
    (out_dir / "index.html").write_text(text, encoding="utf-8")
