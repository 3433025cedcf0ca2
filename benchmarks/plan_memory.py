"""How far `sdlora plan` is from the memory that a run really takes, on a CPU: at most 15 %.

    python benchmarks/plan_memory.py [--case NAME ...]

Each case is a whole run in a process of its own: its peak of resident memory by the kernel against the plan's, once
with the libraries' own share and once without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
CASES: dict[str, dict[str, Any]] = {
    "embedded base, batch 8": {"model.base": "tiny", "train.batch_size": 8},
    "embedded base, batch 32": {"model.base": "tiny", "train.batch_size": 32},
    "embedded base, batch 32, attention+ff": {
        "model.base": "tiny",
        "train.batch_size": 32,
        "lora.targets": "attention+ff",
    },
    "embedded base, batch 32, checkpointing": {
        "model.base": "tiny",
        "train.batch_size": 32,
        "model.gradient_checkpointing": True,
    },
    "embedded base, batch 32, text encoder": {
        "model.base": "tiny",
        "train.batch_size": 32,
        "lora.text_encoder": True,
    },
    "narrow SD 1.5, 256 pixels, batch 8": {
        "model.base": "narrow",
        "train.batch_size": 8,
        "data.resolution": 256,
        "model.precision": "fp32",
    },
}
LIMIT = 0.15


def settings_of(case: str, narrow: Path, out: Path) -> list[str]:
    given = {
        "data.path": str(ROOT / "datasets" / "high-contrast"),
        "data.trigger": "high contrast style",
        "train.exposures": 2,
        "output.dir": str(out),
        **CASES[case],
    }
    if given["model.base"] == "narrow":
        given["model.base"] = str(narrow)
    return [f"{name}={json.dumps(value)}" for name, value in given.items()]


def save_narrow(folder: Path) -> None:
    """A random SD 1.x of the tests: every block of the real one, a tenth as wide."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import tiny_sd1

    tiny_sd1().save_pretrained(folder)


def run(settings: list[str]) -> dict[str, int]:
    """In a process of its own: memory after the imports, and the peak of the run."""
    import resource

    from sdlora.config import load_config
    from sdlora.training import train_adapter

    libraries = psutil.Process().memory_info().rss
    train_adapter(load_config(None, settings))
    return {"libraries": libraries, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def compare(case: str, narrow: Path, out: Path) -> dict[str, Any]:
    from sdlora.config import load_config
    from sdlora.data.dataset import scan_dataset
    from sdlora.plan import FIRST_USE_BYTES
    from sdlora.planning import make_plan

    settings = settings_of(case, narrow, out)
    command = [sys.executable, __file__, "--run", json.dumps(settings)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    config = load_config(None, settings)
    plan = make_plan(config, scan_dataset(config.data.path, trigger=config.data.trigger)).plan
    # Told of the run's own process: this one holds what tracing left.
    planned = plan.peak_bytes - plan.memory["libraries"] + FIRST_USE_BYTES
    own = measured["peak"] - measured["libraries"]
    return {
        "case": case,
        "measured": measured["peak"],
        "planned": planned + measured["libraries"],
        "error": (planned + measured["libraries"]) / measured["peak"] - 1,
        "error_without_libraries": planned / own - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(json.loads(args.run))))
        return
    print("| case | measured | planned | error | without the libraries |\n|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        narrow = Path(place) / "narrow"
        save_narrow(narrow)
        for case in args.case or CASES:
            row = compare(case, narrow, Path(place))
            rows.append(row)
            print(
                f"| {case} | {row['measured'] / 1e6:.0f} MB | {row['planned'] / 1e6:.0f} MB | {row['error']:+.1%} "
                f"| {row['error_without_libraries']:+.1%} |",
                flush=True,
            )
    if any(abs(row["error"]) > LIMIT for row in rows):
        raise SystemExit(f"An error is above {LIMIT:.0%}.")


if __name__ == "__main__":
    main()
