"""Damaged and hostile adapter files without end, from a seed; and a process that reads them under watch.

`python -m tests.adapters.header_fuzz COUNT` reads that many and prints, as JSON, what came of them: how many were read
and refused, by how much the process grew, and whatever it did that reading has no business with.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from sdlora.adapter_file import read_adapter
from sdlora.adapter_tools import inspect_adapter
from sdlora.errors import AdapterError

from .builders import kohya_tensors, peft_metadata, peft_tensors, simple_pairs

FLAT = "lora_unet_mid_block_attentions_0_proj_in"
# What reading must never do, by the names of Python's audit events.
FORBIDDEN = ("exec", "compile", "import", "pickle.find_class", "os.system", "subprocess", "socket", "ctypes", "os.exec")
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, 1e308, "", "../a", "a\0b", "F16", "F64", "é", "__"),
    *([], {}, [0, 0], [-4, 4], [4, 0], [0, 2**62], [[0]], {"a": 1}, ["4", 4], [1] * 5000, [65_536, 65_536]),
)


def seeds() -> list[bytes]:
    """Sound files of every kind, to begin from."""
    pairs = simple_pairs(rank=1)
    loha = {f"{FLAT}.hada_{name}": torch.ones(2, 2) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    lokr = {
        f"{FLAT}.lokr_w1": torch.ones(2, 2),
        f"{FLAT}.lokr_w2": torch.ones(2, 2),
        f"{FLAT}.alpha": torch.tensor(1.0),
    }
    return [
        save(kohya_tensors(pairs), {"format": "pt"}),
        save(peft_tensors(pairs), peft_metadata(pairs)),
        save(loha | {f"{FLAT}.dora_scale": torch.ones(2, 1)}),
        save(lokr | {"lora_unet_conv_in.diff": torch.ones(2, 2, 3, 3)}),
    ]


def damaged(count: int, seed: int) -> Iterator[bytes]:
    """`count` files, each made from a sound one by one or two mutations."""
    chance, sound = random.Random(seed), seeds()
    for _ in range(count):
        content = chance.choice(sound)
        for _ in range(chance.randint(1, 2)):
            content = chance.choice((flip, cut, lie, change_entry, change_entry, change_name, change_text))(
                content, chance
            )
        yield content


def flip(content: bytes, chance: random.Random) -> bytes:
    """Other bytes, mostly in the header."""
    edited = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        if edited:
            end = len(edited) if chance.random() < 0.3 else min(len(edited), 8 + header_length(content))
            edited[chance.randrange(max(1, end))] = chance.randrange(256)
    return bytes(edited)


def cut(content: bytes, chance: random.Random) -> bytes:
    """Ended early, or going on with something else."""
    rest = chance.choice((b"", b"\0", b"PK\x03\x04", b"<html>", b"}" * 9, chance.randbytes(20)))
    return content[: chance.randint(0, len(content))] + rest if chance.random() < 0.5 else content + rest


def lie(content: bytes, chance: random.Random) -> bytes:
    """Another length of the header than it has."""
    length = chance.choice((0, 1, header_length(content) + chance.randint(-9, 9), 2**20, 2**33, 2**63, 2**64 - 1))
    return (length % 2**64).to_bytes(8, "little") + content[8:]


def change_entry(content: bytes, chance: random.Random) -> bytes:
    """One field of one tensor becomes something hostile, vanishes or is doubled."""

    def change(header: dict[str, Any]) -> None:
        name = chance.choice(list(header) or [""])
        entry = header.get(name)
        if isinstance(entry, dict) and entry and chance.random() < 0.8:
            entry[chance.choice([*entry, "more"])] = chance.choice(HOSTILE)
        elif chance.random() < 0.5:
            header.pop(name, None)
        else:
            header[name] = chance.choice(HOSTILE)

    return edited(content, change)


def change_name(content: bytes, chance: random.Random) -> bytes:
    """One tensor is called otherwise: by another role, another layer, or by nonsense."""

    def change(header: dict[str, Any]) -> None:
        name = chance.choice(list(header) or [""])
        stem, _, role = name.partition(".")
        roles = ("alpha", "lora_up.weight", "lora_mid.weight", "dora_scale", "hada_t1", "lokr_t2", "lokr_w1_a", "diff")
        header[chance.choice((f"{stem}.{chance.choice(roles)}", f"{stem}_0.{role}", "a" * 600, "../x", "\0", ""))] = (
            header.pop(name, 0)
        )

    return edited(content, change)


def change_text(content: bytes, chance: random.Random) -> bytes:
    """The header as a text: nested without end, twice the same name, other kinds of JSON."""
    length = header_length(content)
    text = content[8 : 8 + length]
    made = chance.choice(
        (
            b"[" * chance.randint(1, 5_000),
            b'{"a":' * chance.randint(1, 5_000),
            text.replace(b"}", b',"shape":[1]}', 1),
            text[:-1] + b"," + text[1:],
            text + b" " * chance.randint(0, 99),
            text.replace(b"F32", chance.choice((b"F16", b"BOOL", b"F8_E5M2", b"\xff\xfe"))),
            b'{"__metadata__":{"lora_adapter_metadata":"' + b"[" * 9999 + b'"}}',
        )
    )
    return len(made).to_bytes(8, "little") + made + content[8 + length :]


def edited(content: bytes, change: Any) -> bytes:
    length = header_length(content)
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return content
    if not isinstance(header, dict):
        return content
    change(header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def header_length(content: bytes) -> int:
    return min(int.from_bytes(content[:8], "little"), len(content))


def read_or_refuse(content: bytes, path: Path) -> bool:
    """Whether the file is read; else it is refused in one line, and nothing else happens."""
    path.write_bytes(content)
    try:
        read_adapter(path)
        # What is read can be described, whatever its header says.
        inspect_adapter(path)
    except AdapterError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    return True


def main(count: int) -> None:
    import resource

    did: list[str] = []
    watching = False

    def watch(event: str, arguments: object) -> None:
        if watching and event.startswith(FORBIDDEN):
            did.append(f"{event} {str(arguments)[:80]}")

    sys.addaudithook(watch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.safetensors"
        # Whatever is imported late is imported here.
        for content in (*seeds(), *damaged(50, seed=0)):
            read_or_refuse(content, path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        watching = True
        read = sum(read_or_refuse(content, path) for content in damaged(count, seed=1))
        watching = False
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"read": read, "refused": count - read, "growth_mb": growth, "did": did[:5]}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
