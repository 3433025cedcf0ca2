"""Where other tools keep their LoRAs, and how a file gets there without pushing another one out."""

from __future__ import annotations

from pathlib import Path

from sdlora.errors import AdapterError

__all__ = ["TOOLS", "new_file", "put_file", "tool_folder"]

TOOLS = ("comfyui", "a1111", "forge", "invokeai")

_FOLDERS = {"comfyui": ("loras",), "a1111": ("Lora",), "forge": ("Lora",)}


def tool_folder(tool: str, root: Path) -> Path:
    """The folder for LoRAs of a tool that lies in `root`: `models/loras`, `models/Lora`; made if it is not there.

    InvokeAI looks through any folder that it is told to scan, so there it is `root` itself.

    Raises:
        AdapterError: there is no such tool, or it does not lie there.
    """
    if tool not in TOOLS:
        raise AdapterError(f"No tool is called {tool!r}. Known: {', '.join(TOOLS)}.")
    if not root.is_dir():
        raise AdapterError(f"{root}: there is no such folder.")
    if tool == "invokeai":
        return root
    # ComfyUI's portable version has itself in a folder of its own.
    models = next((place / "models" for place in (root, root / "ComfyUI") if (place / "models").is_dir()), None)
    if models is None:
        raise AdapterError(f"{root} is not the folder of {tool}: it has no folder `models`.")
    folder = models.joinpath(*_FOLDERS[tool])
    folder.mkdir(exist_ok=True)
    return folder


def new_file(target: Path, *, overwrite: bool = False) -> Path:
    """`target`, once it is clear that an adapter file can be written there and nothing is lost by it.

    Raises:
        AdapterError: it is a folder, has another ending, its folder is missing, or it is there and is to stay.
    """
    if target.is_dir():
        raise AdapterError(f"{target} is a folder. Name the file to write, e.g. {target / 'new.safetensors'}.")
    if target.suffix.lower() != ".safetensors":
        raise AdapterError(f"{target}: call the file to write {target.name}.safetensors; no tool loads another ending.")
    if not target.parent.is_dir():
        raise AdapterError(f"{target}: there is no folder {target.parent}. Make it first.")
    if target.exists() and not overwrite:
        raise AdapterError(f"{target} is there already. Choose another name, or say --overwrite.")
    return target


def put_file(target: Path, content: bytes) -> Path:
    """Writes a new file and returns its path; the same file may be there already.

    Raises:
        AdapterError: another file has that name, or the disk does not take it.
    """
    try:
        with target.open("xb") as file:
            file.write(content)
    except FileExistsError as error:
        if target.is_file() and target.read_bytes() == content:
            return target
        raise AdapterError(f"{target} is there already and is another file. Rename one of them.") from error
    except OSError as error:
        target.unlink(missing_ok=True)
        raise AdapterError(f"{target}: cannot be written ({error.strerror}).") from error
    return target
