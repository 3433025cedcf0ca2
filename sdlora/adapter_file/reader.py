"""Read an adapter file of any known dialect, strictly: every tensor is understood, or the file is refused.

The header is checked, all names are taken apart and all shapes are compared before the tensors are read.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sdlora.adapter_file.dialects import Role, TensorName, parse_tensor_name, unsupported_method
from sdlora.adapter_file.fold import is_finite
from sdlora.adapter_file.lycoris import Plan, factor_roles, plan_layer
from sdlora.adapter_file.peft_config import PeftAlphas
from sdlora.adapter_file.safety import MAX_ALPHA_PER_RANK, MAX_RANK, Header, read_header
from sdlora.adapter_file.types import PARTS, AdapterWeights, LoraPair, Part
from sdlora.errors import AdapterFileError

__all__ = ["Outline", "name_some", "outline_adapter", "read_adapter"]

_MAX_NUMBERS = 3 * 10**9
"""Of all pairs of a file together; a whole SDXL U-Net has 2.6e9."""


@dataclass(frozen=True)
class Outline:
    """What a file is by its header alone: no tensor is read for it."""

    metadata: Mapping[str, str]
    dialects: tuple[str, ...]
    """ "kohya", "peft", "diffusers"; most files have one."""
    methods: tuple[str, ...]
    """ "LoRA", "LoHa", "LoKr", "full difference", "DoRA"."""
    layers: Mapping[tuple[Part, str], Plan]
    names: tuple[str, ...]
    """Of all tensors, as the file has them."""

    @property
    def cross_attention_dim(self) -> int | None:
        """As of `AdapterWeights`."""
        keys = ("attn2.to_k", "attn2.to_v")
        return next(
            (p.inner for (part, path), p in self.layers.items() if part == "unet" and path.endswith(keys)), None
        )


def read_adapter(path: str | Path, *, drop_foreign: bool = False) -> AdapterWeights:
    """Read a LoRA in kohya's, PEFT's or diffusers' older dialect; tensors on the CPU in the file's types.

    LyCORIS' other kinds (LoHa, LoKr, LoCon with a middle, full differences) become plain fp32 pairs, exactly. A missing
    alpha means alpha = rank, as every other tool takes it. Tensors that are no part of a LoRA refuse the file, or with
    `drop_foreign` are left out and named. Raises AdapterFileError with one sentence.
    """
    path = Path(path)
    _check_is_file(path)
    try:
        with path.open("rb") as file:
            header = read_header(file, path)
            layers, foreign = _layers(path, header, allow_foreign=drop_foreign)
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise AdapterFileError(path, f"it cannot be read: {error.strerror}.") from error
    # Hashing takes about as long as all the rest, and lets other threads run meanwhile.
    with ThreadPoolExecutor(max_workers=1) as beside:
        digest = beside.submit(hashlib.sha256, memoryview(content)[header.size :])
        tensors = _tensors(path, content, header)
        alphas = PeftAlphas(path, header.metadata)
        parts: dict[Part, dict[str, LoraPair]] = {part: {} for part in PARTS}
        for (part, module), layer in sorted(layers.items()):
            parts[part][module] = _pair(path, part, module, layer, tensors, alphas)
        tensor_sha256 = digest.result().hexdigest()
    return AdapterWeights(**parts, metadata=header.metadata, path=path, tensor_sha256=tensor_sha256, foreign=foreign)


def outline_adapter(path: str | Path, *, allow_foreign: bool = False) -> Outline:
    """What the file holds, checked as strictly as by `read_adapter`, but for the numbers themselves.

    Raises:
        AdapterFileError: the header is not that of a sound adapter.
    """
    path = Path(path)
    _check_is_file(path)
    try:
        with path.open("rb") as file:
            header = read_header(file, path)
    except OSError as error:
        raise AdapterFileError(path, f"it cannot be read: {error.strerror}.") from error
    layers, _ = _layers(path, header, allow_foreign=allow_foreign)
    methods = {layer.plan.kind for layer in layers.values() if layer.plan is not None}
    has_dora = any("dora_scale" in layer.names for layer in layers.values())
    return Outline(
        metadata=header.metadata,
        dialects=tuple(sorted({layer.dialect for layer in layers.values()})),
        methods=(*sorted(methods), *(["DoRA"] if has_dora else [])),
        layers={key: layer.plan for key, layer in layers.items() if layer.plan is not None},
        names=tuple(header.tensors),
    )


@dataclass
class _Layer:
    """The names in the file of one layer's tensors, by role."""

    names: dict[Role, str] = field(default_factory=dict)
    dialect: str = ""
    plan: Plan | None = None
    """Set once the shapes are checked."""


def name_some(names: Iterable[str], *, at_most: int = 3) -> str:
    """ "a, b, c and 5 more", for messages."""
    everything = list(names)
    shown = ", ".join(everything[:at_most])
    return shown if len(everything) <= at_most else f"{shown} and {len(everything) - at_most} more"


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise AdapterFileError(path, "this is a folder; name the .safetensors file in it.")
    if not path.exists():
        raise AdapterFileError(path, _not_there(path))
    # Opening a pipe would wait for its writer.
    if not path.is_file():
        raise AdapterFileError(path, "this is not a regular file.")


def _not_there(path: Path) -> str:
    """That there is no such file, and what may be meant if one beside it is called nearly so."""
    beside = {other.stem: other for other in path.parent.glob("*.safetensors")} if path.parent.is_dir() else {}
    meant = difflib.get_close_matches(path.name.removesuffix(".safetensors"), beside, n=1, cutoff=0.75)
    return f"there is no such file; did you mean {beside[meant[0]]}?" if meant else "there is no such file."


def _layers(
    path: Path, header: Header, *, allow_foreign: bool
) -> tuple[dict[tuple[Part, str], _Layer], tuple[str, ...]]:
    """Group the tensors by layer and check names, completeness and shapes; and the names of those that are of none."""
    parsed = {name: parse_tensor_name(name) for name in header.tensors}
    foreign = tuple(name for name, tensor in parsed.items() if tensor is None)
    method = next((m for m in map(unsupported_method, foreign) if m is not None), None)
    if method is not None:
        raise AdapterFileError(path, f"this is a {method} file, which is not supported; ask for a LoRA.")
    if len(foreign) == len(parsed):
        names = name_some(header.tensors)
        raise AdapterFileError(path, f"none of its tensors belongs to a LoRA for Stable Diffusion: {names}.")
    if foreign and not allow_foreign:
        one = len(foreign) == 1
        what = f"{'a tensor' if one else f'{len(foreign)} tensors'} that {'is' if one else 'are'} not part of a LoRA"
        remedy = "`sdlora lora convert FILE NEW --drop-foreign` writes the rest"
        raise AdapterFileError(path, f"it holds {what}: {name_some(foreign)}; {remedy}.")
    layers: dict[tuple[Part, str], _Layer] = {}
    for name, tensor in parsed.items():
        _add(path, layers, name, tensor)
    for (_, module), layer in layers.items():
        layer.plan = _plan(path, module, layer, header)
    numbers = sum(layer.plan.numbers for layer in layers.values() if layer.plan is not None)
    if numbers > _MAX_NUMBERS:
        raise AdapterFileError(path, f"its changes would need {numbers:.1e} numbers, more than any U-Net has.")
    return layers, foreign


def _add(path: Path, layers: dict[tuple[Part, str], _Layer], name: str, tensor: TensorName | None) -> None:
    if tensor is None:
        return
    layer = layers.setdefault((tensor.part, tensor.path), _Layer())
    if tensor.role in layer.names:
        raise AdapterFileError(path, f"{layer.names[tensor.role]!r} and {name!r} are the same tensor of one layer.")
    layer.names[tensor.role] = name
    if tensor.role != "alpha":
        layer.dialect = tensor.dialect


def _plan(path: Path, module: str, layer: _Layer, header: Header) -> Plan:
    """How the layer is built, from names and shapes alone."""
    roles = frozenset(layer.names) - {"alpha", "dora_scale"}
    kind = factor_roles(roles)
    if kind is None:
        if roles <= {"down", "up"}:
            missing = [role for role in ("down", "up") if role not in layer.names]
            found = " and ".join(layer.names)
            raise AdapterFileError(path, f"{module} has {found}, but its {' and '.join(missing)} factor is missing.")
        raise AdapterFileError(
            path, f"{module} has an incomplete set of tensors: {name_some(sorted(roles), at_most=9)}."
        )
    shapes = {role: header.tensors[name].shape for role, name in layer.names.items()}
    plan = plan_layer(kind, module, shapes)
    if plan is None:
        found = ", ".join(f"{role} {list(shapes[role])}" for role in layer.names if role in roles)
        raise AdapterFileError(path, f"the factors of {module} do not fit: {found}.")
    if (plan.stored_rank or 1) > MAX_RANK:
        raise AdapterFileError(path, f"{module} has rank {plan.stored_rank}; at most {MAX_RANK} is read.")
    if math.prod(shapes.get("alpha", ())) != 1:
        raise AdapterFileError(path, f"the alpha of {module} is not one number.")
    if "dora_scale" in shapes and _dora_sides(shapes["dora_scale"], plan, layer.dialect) is None:
        raise AdapterFileError(path, f"the DoRA lengths of {module} do not fit: {list(shapes['dora_scale'])}.")
    return plan


def _dora_sides(shape: tuple[int, ...], plan: Plan, dialect: str) -> tuple[int, int] | None:
    """[out, 1] or [1, in], as which the lengths are kept; PEFT has a vector by row, for convolutions [1, out, 1, 1]."""
    if dialect == "peft":
        return (plan.out, 1) if math.prod(shape) == max(shape) == plan.out else None
    if len(shape) < 2 or any(side != 1 for side in shape[2:]):
        return None
    return (shape[0], shape[1]) if shape[:2] in ((plan.out, 1), (1, plan.inner)) else None


def _tensors(path: Path, content: bytes, header: Header) -> Mapping[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
    except SafetensorError as error:
        raise AdapterFileError(path, "the safetensors library does not accept this file.") from error
    if tensors.keys() != header.tensors.keys():
        raise AdapterFileError(path, "its header reads differently a second time; it is not taken.")
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise AdapterFileError(path, f"NaN or infinite numbers in {name_some(broken)}; the training went wrong.")
    return tensors


def _pair(
    path: Path, part: Part, module: str, layer: _Layer, tensors: Mapping[str, Tensor], alphas: PeftAlphas
) -> LoraPair:
    plan = layer.plan
    assert plan is not None
    rank = plan.stored_rank
    alpha: float | None = None
    if "alpha" in layer.names:
        alpha = float(tensors[layer.names["alpha"]].item())
    elif layer.dialect == "peft" and rank is not None:
        alpha = alphas.alpha(part, module, rank)
    # LoKr of two whole matrices stores an alpha that nobody reads.
    if alpha is not None and rank is not None and not 0 < alpha <= MAX_ALPHA_PER_RANK * rank:
        limits = f"between 0 and {MAX_ALPHA_PER_RANK:g} times the rank"
        raise AdapterFileError(path, f"{module} has alpha {alpha:g} at rank {rank}; alpha must lie {limits}.")
    pair = plan.build({role: tensors[name] for role, name in layer.names.items()}, alpha)
    if "dora_scale" in layer.names:
        lengths = tensors[layer.names["dora_scale"]]
        sides = _dora_sides(tuple(lengths.shape), plan, layer.dialect)
        assert sides is not None
        return dataclasses.replace(pair, dora_scale=lengths.reshape(sides))
    if layer.dialect == "peft" and alphas.is_dora(part):
        raise AdapterFileError(path, f"its configuration says DoRA, but {module} has no lora_magnitude_vector.")
    return pair
