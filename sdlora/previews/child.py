"""The process that draws previews beside a run, `python -m sdlora.previews.child`: lines of JSON in and out.

The first line says with which base and where, each further one is a task. It steps back behind everything else on the
computer, and ends when its standard input does: so it never outlives the run, however that ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from sdlora.generation import Generator

__all__ = ["main"]


def main() -> None:
    """Draws until its standard input ends."""
    _step_back()
    answers, tasks = _own_output(), SimpleQueue[dict[str, Any]]()
    threading.Thread(target=_listen, args=(sys.stdin, tasks), daemon=True).start()

    def answer(**fields: Any) -> None:
        answers.write(f"{json.dumps(fields)}\n")
        answers.flush()

    start = tasks.get()

    from sdlora.errors import SdloraError
    from sdlora.previews.drawing import failure

    try:
        generator = _generator(start)
    except (SdloraError, MemoryError, RuntimeError) as error:
        answer(unable=failure(error))
        return
    answer(able=True)
    while True:
        task = tasks.get()
        try:
            for index in _drawn(generator, start, task):
                answer(picture=index)
            answer(done=True)
        except (SdloraError, MemoryError, RuntimeError) as error:
            answer(failed=failure(error))


def _generator(start: dict[str, Any]) -> Generator:
    import torch

    from sdlora.generation import Generator

    if start["threads"]:
        torch.set_num_threads(start["threads"])
    return Generator.from_base(start["base"], device=start["device"])


def _drawn(generator: Generator, start: dict[str, Any], task: dict[str, Any]) -> Iterator[int]:
    from sdlora.config import PreviewConfig
    from sdlora.previews.drawing import PreviewTask, draw_previews

    pictures = tuple((prompt, Path(path)) for prompt, path in task["pictures"])
    wanted = PreviewTask(task["step"], Path(task["adapter"]), pictures)
    settings = PreviewConfig.model_validate_json(start["settings"])
    for index, _ in enumerate(draw_previews(generator, wanted, settings, start["resolution"])):
        yield index


def _listen(lines: TextIO, tasks: SimpleQueue[dict[str, Any]]) -> None:
    for line in lines:
        tasks.put(json.loads(line))
    # In the middle of a picture too: there is nobody left to draw for.
    os._exit(0)


def _step_back() -> None:
    """Lowest priority for the CPU, and the first to go when memory runs out. Windows sets it from outside."""
    if os.name != "posix":
        return
    os.nice(19)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _own_output() -> TextIO:
    """Standard output for the answers alone; what libraries print goes with the errors."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
