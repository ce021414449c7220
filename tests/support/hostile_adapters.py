"""Adapters that are damaged or made to do harm: valid ones of PEFT's, changed at random in one place or a few."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.adapter_folders import PREFIX, Small, saved_by_peft

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class Tied(nn.Module):
    """A projection and a head of one weight, with running figures between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.lin = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 8)
        self.head.weight = self.proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin(self.norm(self.proj(x))))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "small": Small,
    "tied": Tied,
    "half": lambda: Small().half(),
    "bfloat16": lambda: Small().bfloat16(),
}


@dataclass(frozen=True)
class Template:
    """A valid adapter: the name of its model's builder, its configuration and its tensors."""

    builder: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def templates(folder: Path) -> list[Template]:
    """Return valid adapters, which are saved to `folder` in between."""
    made = []
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("small", {}),
        ("small", {"modules_to_save": ["head"], "rank_pattern": {"blocks.1.lin": 2}, "use_rslora": True}),
        ("small", {"target_modules": r"proj|blocks\.\d\.lin", "alpha_pattern": {r"blocks\.[01]\.lin": 3}}),
        ("small", {"target_modules": ["lin"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"}),
        ("tied", {"target_modules": ["lin"], "modules_to_save": ["head", "norm"]}),
        ("tied", {"target_modules": ["lin"], "exclude_modules": ["proj"]}),
        ("half", {"modules_to_save": ["head"]}),
        ("bfloat16", {}),
    ]
    for number, (builder, options) in enumerate(wanted):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = saved_by_peft(folder / str(number), BUILDERS[builder], **options)
        made.append(Template(builder, json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)))
    return made


def write_hostile(rng: Random, template: Template, folder: Path) -> str:
    """Write a changed adapter to `folder`, which is made, and return what was changed."""
    folder.mkdir(parents=True)
    config, tensors = dict(template.config), dict(template.tensors)
    notes = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        twice = (_change_field, _change_tensor)
        kind = rng.choice((*twice, *twice, _change_pattern, _add_base, _change_mildly))
        notes.append(kind(rng, config, tensors, template))
    (folder / CONFIG).write_text(json.dumps(config))
    if rng.random() < 0.15:
        torch.save(tensors, folder / PICKLED)
        if rng.random() < 0.5:
            notes.append(_change_pickle(rng, folder / PICKLED, tensors))
    else:
        # Tensors that share memory are not saved.
        save_file({name: value.clone().contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    if rng.random() < 0.25:
        notes.append(
            rng.choice((_change_bytes, _change_bytes, _change_text, _change_header, _change_files))(rng, folder)
        )
    return "; ".join(notes)


# ---------------------------------------------------------------------------------------------------- configuration

_NAMES = ("proj", "lin", "head", "norm", "blocks.0.lin", "blocks.1", "blocks", "", ".", "nothing", "weight")
_SLOW = ("(a+)+b", "(.*)*x", "(a|a)*$", ".*.*.*.*.*.*y", "(?:(?:a{1,99}){1,99}){1,99}", "a{99999999999}", "(x+x+)+y")
_ODD_EXPRESSIONS = (
    "(",
    "[",
    "*",
    "(?i)proj",
    "(?P<idx>proj)",
    "proj\\",
    "\\1",
    "(?<=p)roj",
    "(?#",
    "proj|",
    "^proj$",
    ".*",
)


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


def _odd_value(rng: Random) -> Any:
    return rng.choice(
        (
            *(None, True, False, 0, 1, -1, 2, 3, 4, 8, 256, 257, 2**31, 2**63, 10**30, 10**400, -(10**400)),
            *(0.0, 0.5, 1.0, -0.0, 4.0, 1e-320, 1e30, 1e300, float("nan"), float("inf"), float("-inf")),
            *("", "4", "true", "nan", "LORA", "CAUSAL_LM", "SEQ_CLS", "lora", "\ud800", "\0", "a\nb", "é" * 300),
            *([], {}, [None], [[]], [1], ["proj"], ["proj", 3], ["proj", None], ["lin", "proj", "lin"], {"proj": 4}),
            *({"proj": None}, {"a": {"b": 1}}, {"": 4}, [True], ["x"] * 9, "all-linear", "proj", "lin", "head"),
            *(_deep(3), _deep(40), _deep(200), rng.choice(_NAMES), [rng.choice(_NAMES)], rng.choice(_SLOW)),
        )
    )


_FIELDS = (*(field.name for field in fields(LoraConfig)), "a_later_field", "cls", "self", "kwargs", "a\nb", "")


def _change_field(rng: Random, config: dict[str, Any], tensors: object, template: object) -> str:
    name = rng.choice((*_FIELDS, *config))
    if rng.random() < 0.1:
        config.pop(name, None)
        return f"without {name!r}"
    config[name] = _odd_value(rng)
    return f"{name!r} = {str(config[name])[:60]!r}"


def _change_pattern(rng: Random, config: dict[str, Any], tensors: object, template: object) -> str:
    pattern = rng.choice((*_SLOW, *_ODD_EXPRESSIONS, *_NAMES))
    value = rng.choice((1, 2, 4, 8, _odd_value(rng)))
    field, content = rng.choice(
        (
            ("rank_pattern", {pattern: value}),
            ("alpha_pattern", {pattern: value}),
            ("target_modules", pattern),
            ("exclude_modules", pattern),
            ("target_modules", [pattern, "proj"]),
            ("exclude_modules", [pattern]),
            ("layers_pattern", rng.choice((pattern, [pattern]))),
            ("modules_to_save", [pattern]),
        )
    )
    config[field] = content
    if field == "layers_pattern":
        config["layers_to_transform"] = rng.choice((0, [0, 1, 2], _odd_value(rng)))
    return f"{field} = {content!r:.80}"


def _change_mildly(rng: Random, config: dict[str, Any], tensors: dict[str, Tensor], template: object) -> str:
    """Change what may be another way in a valid adapter."""
    if rng.random() < 0.5:
        dtype = rng.choice((torch.float64, torch.bfloat16, torch.float16))
        tensors.update({name: value.to(dtype) for name, value in tensors.items() if value.is_floating_point()})
        return f"in {dtype}"
    fields = rng.choice(
        (
            *({"lora_alpha": 1e-3}, {"lora_alpha": 10**6}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"r": 300}),
            *({"alpha_pattern": {"lin": 3.5}}, {"later": None}, {"init_lora_weights": "gaussian"}, {"revision": "x"}),
            *({"fan_in_fan_out": True}, {"task_type": "CAUSAL_LM"}, {"runtime_config": {"x": 1}}),
        )
    )
    config.update(fields)
    return str(fields)


# ---------------------------------------------------------------------------------------------------------- tensors

_DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8),
    *(torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint16),
)
_VALUES = (float("nan"), float("inf"), -float("inf"), 1e30, 7e4, -7e4, 1e-40, 1e-30, -0.0, 0.0, 3.4e38)


def _change_tensor(rng: Random, config: object, tensors: dict[str, Tensor], template: object) -> str:
    if not tensors:
        return "nothing"
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    kind = rng.randrange(6)
    if kind == 0:
        del tensors[name]
        return f"without {name}"
    if kind == 1:
        new = _odd_name(rng, name)
        tensors[new] = tensors.pop(name)
        return f"{name} is called {new!r:.80}"
    if kind == 2:
        shape = rng.choice(
            ((), (0,), (1,), (8,), (0, 8), (8, 0), (3, 8), (8, 3), (4, 8, 1), tuple(reversed(value.shape)))
        )
        tensors[name] = torch.ones(shape)
        return f"{name} has shape {shape}"
    if kind == 3:
        dtype = rng.choice(_DTYPES)
        tensors[name] = value.to(dtype)
        return f"{name} is {dtype}"
    if kind == 4 and value.numel() and value.is_floating_point() and value.dtype.itemsize > 1:
        number = rng.choice(_VALUES)
        tensors[name] = value.clone()
        tensors[name].view(-1)[rng.randrange(value.numel())] = number
        return f"{name} holds {number}"
    new = _odd_name(rng, name)
    tensors[new] = value.clone()
    return f"{name} is there again as {new!r:.80}"


def _odd_name(rng: Random, name: str) -> str:
    return rng.choice(
        (
            *(
                name.removeprefix(PREFIX),
                PREFIX + name,
                name.upper(),
                f"{name}\n",
                f"{name}.",
                name.replace(".", ""),
                "",
            ),
            *(
                name.replace(".weight", ".default.weight"),
                name.replace("lora_A", "lora_B"),
                name.replace("lora_", "lora"),
            ),
            *(name.replace("lora_A.weight", "lora_A.a.b.weight"), name.replace("blocks.1", "blocks.9"), "é\n\r" * 40),
            *(
                name.replace("proj", "head"),
                name.replace("head.", "head.original_module."),
                f"{PREFIX}\x00",
                "x" * 5000,
            ),
            *(name.replace("head.", "head.modules_to_save.default."), name.replace("lora_A", "lora_embedding_A")),
            *(name.replace("lora_A", "lora_magnitude_vector"), name.replace("weight", "bias")),
        )
    )


def _add_base(rng: Random, config: object, tensors: dict[str, Tensor], template: Template) -> str:
    own = BUILDERS[template.builder]().state_dict()
    key = rng.choice(sorted(own))
    value = torch.full(own[key].shape, rng.choice((1.0, 2.5, *_VALUES)))
    if rng.random() < 0.8:
        value = torch.nan_to_num(value).clamp(-100, 100).to(rng.choice((own[key].dtype, torch.float32)))
    owner, _, leaf = key.rpartition(".")
    name = rng.choice(
        (f"{PREFIX}{key}", f"{PREFIX}{owner}.base_layer.{leaf}", key, f"{PREFIX}{owner}.original_module.{leaf}")
    )
    tensors[name] = value
    return f"with {name}, {value.dtype}, of {value.flatten()[:1].tolist()}"


# ------------------------------------------------------------------------------------------------------------ files


class Command:
    """An object whose unpickling makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, (self.path,)


def _change_pickle(rng: Random, path: Path, tensors: dict[str, Tensor]) -> str:
    name = next(iter(tensors), "x")
    huge = torch.ones(1).expand(2**40, 2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's sparse kinds are not final
        content = rng.choice(
            (
                *(None, [], [1], {}, {name: None}, {1: torch.ones(2)}, {name: 3}, torch.ones(2), {name: tensors}),
                *({**tensors, name: Command(str(path.with_name("trace")))}, {**tensors, name: huge}),
                *({**tensors, name: torch.ones(4, 8).to_sparse()}, {**tensors, name: torch.ones(4, 8).to_sparse_csr()}),
                *({**tensors, name: torch.ones(4, 8, device="meta")}, {**tensors, ("a",): torch.ones(2)}),
                {**tensors, name: nn.Parameter(torch.ones(4, 8))},
                {**tensors, name: torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.qint8)},
            )
        )
    torch.save(content, path)
    return f"a pickle of {type(content).__name__}"


def _file_of(rng: Random, folder: Path) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def _change_bytes(rng: Random, folder: Path) -> str:
    path = _file_of(rng, folder)
    content = bytearray(path.read_bytes())
    kind = rng.randrange(5)
    if kind == 0:
        del content[rng.randrange(len(content) + 1) :]
    elif kind == 1:
        content += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
    elif kind == 2:
        content = bytearray(rng.randrange(256) for _ in range(rng.randrange(60)))
    else:
        for _ in range(rng.choice((1, 1, 3, 20))):
            content[rng.randrange(min(len(content), rng.choice((8, 300, 10**6))))] = rng.randrange(256)
    path.write_bytes(content)
    return f"{path.name}: bytes changed ({kind})"


def _change_text(rng: Random, folder: Path) -> str:
    path = folder / CONFIG
    text = path.read_text()
    new = rng.choice(
        (
            *(
                "",
                "null",
                "[]",
                "3",
                '"x"',
                "NaN",
                "{",
                "\ufeff" + text,
                text + text,
                text.replace('"r"', '"r": 2, "r"'),
            ),
            *(
                "[" * 100000,
                '{"a":' * 100000,
                text[:-1] + ', "r": ' + "9" * 5000 + "}",
                text[:-1] + ', "lora_alpha": NaN}',
            ),
            *(text[:-1] + ', "r": 1e400}', text[:-1] + ', "peft_type": "LORA"}', text.replace('"', "'")),
            *(text[:-1] + ', "later": ' + "[" * 900 + "]" * 900 + "}", text.replace(":", ": \\u0000", 1)),
            text[:-1] + ', "lora_dropout": -Infinity}',
        )
    )
    path.write_text(new, encoding="utf-8")
    return f"{CONFIG} is {new[:40]!r}… {new[-40:]!r}"


def _change_header(rng: Random, folder: Path) -> str:
    """Change the header of a safetensors file, which stays JSON."""
    path = folder / WEIGHTS
    if not path.is_file():
        return "no header"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + size].decode(), content[8 + size :]
    header = json.loads(text)
    name = rng.choice(sorted(header))
    if isinstance(header[name], dict) and "data_offsets" in header[name]:
        field = rng.choice(("data_offsets", "shape", "dtype"))
        header[name][field] = rng.choice(
            ([0, 0], [0, 128], [128, 0], [-1, 4], [0, 2**63], [2**60, 2**60], "F32", "F99", None)
        )
    kind = rng.randrange(5)
    if kind == 0:
        text = json.dumps(header)
    elif kind == 1:
        key = json.dumps(name)
        text = text.replace(key, f"{key}:{json.dumps(header[name])},{key}", 1)
    elif kind == 2:
        text = "[" * 9000
    elif kind == 3:
        header[name] = rng.choice((None, 3, [], "x", {}))
        text = json.dumps(header)
    length = len(text.encode()) if kind != 4 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, size - 1, size + 1))
    path.write_bytes(length.to_bytes(8, "little") + text.encode() + data)
    return f"the header of {WEIGHTS} ({kind})"


def _change_files(rng: Random, folder: Path) -> str:
    path = _file_of(rng, folder)
    kind = rng.randrange(6)
    if kind == 0:
        path.unlink()
        os.mkfifo(path)
    elif kind == 1:
        path.unlink()
        path.mkdir()
    elif kind == 2:
        path.unlink()
        path.symlink_to("nowhere")
    elif kind == 3:
        path.unlink()
        path.symlink_to(path.name)
    elif kind == 4:
        shutil.move(path, folder / "moved")
        path.symlink_to("moved")
    else:
        (folder / PICKLED).write_bytes(b"not read") if path.name == WEIGHTS else path.unlink()
    return f"{path.name}: another kind of file ({kind})"
