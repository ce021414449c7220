"""The configuration's tables `[model]` and `[data]`, and a check that their settings are compatible."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fed.config.fields import Count, CountOrNone, Fraction, FractionOrNone, Name, PathName, Positive, Table
from fed.config.toml_files import shown

# The columns of each GLUE task that hold the text and, for pairs of texts, the second text.
GLUE = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "wnli": ("sentence1", "sentence2"),
}
INSTRUCTIONS = ("natural-instructions", "dolly")
CHAT = "chat"  # the prompt that the checkpoint's chat template writes
CHAT_USER = "{instruction}\n\n{input}"
PROMPT = "{instruction}\n\nInput: {input}\n\nOutput:\n"
PARTITIONS = ("dirichlet", "iid", "pathological", "natural")

_TURNED = {"rotate90": "turned by 90°", "rotate180": "turned by 180°", "invert": "inverted", "none": "undisturbed"}


class ModelConfig(Table):
    """The base model: a local checkpoint, or without `path` a small ViT, pretrained on unshifted digits.

    `dtype` is that of its weights; "auto" is the checkpoint's own, and float32 for the ViT. A classification head is
    held in float32 over a base in half precision. `quantize` holds the linear layers of a checkpoint in 4 bits ("nf4")
    or 8 ("int8"), by the library bitsandbytes. `attention` is transformers' `attn_implementation`; "auto" leaves it to
    transformers. `matmul_precision` is how exact products of float32 matrices are, as torch names it. A run refers to
    its checkpoint; with `copy_base` its directory holds a copy.
    """

    path: PathName | None = None
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["none", "nf4", "int8"] = "none"
    attention: Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$", max_length=100)] = "auto"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    copy_base: bool = False
    pretrain_steps: Annotated[int, Field(ge=1, le=100_000)] = 500
    pretrain_learning_rate: Positive = 2e-3
    pretrain_batch_size: Count = 16


class DataConfig(Table):
    """The data: the source of its rows, the task, and the partition among clients.

    `name` is the source. "digits": scikit-learn's digits, with the `shift` applied for clients and test. "files":
    `path`, a JSON, JSONL, CSV, TSV or Parquet file or a folder of such files; `test_path` may give test rows. "glue"
    (`subset` is the GLUE task), "dolly", "natural-instructions" and "hub" (`path` is the name there) are loaded by the
    library `datasets` from `split`, with test rows from `test_split` if it is set; `path` may be a local copy. For
    "natural-instructions" that is a folder of files, one for each task, and `tasks` names the tasks to use.

    `task` is "classification" of the column `text`, with `text_pair` for pairs, into the values of `label`; or
    "instruction", in which a causal language model learns to answer `prompt` with the column `output`. In `prompt`
    {column} stands for a row's value, and lines whose columns are all empty are left out. With `prompt` "chat" the
    checkpoint's chat template writes the prompt, from `chat_system`, if there is one, and `chat_user`. Evaluation
    generates at most `max_new_tokens` tokens for each of at most `generated_rows` rows (0: all).

    `partition` is how rows are divided among clients, by the values of `partition_by` or else by label: "dirichlet"
    (`clients.dirichlet_alpha`), "iid", "pathological" (`labels_per_client`), "natural" (all rows of a value go to one
    client), or the name of a partitioner of `flwr_datasets`, with the arguments `partition_options`. With
    `rows_per_client` above 0 each client instead draws that many rows, which other clients may have as well.
    `train_rows` and `test_rows` limit the numbers of rows, drawn at random; 0 takes all. `cache` is where tokens are
    cached: in the user's cache directory (true), nowhere (false), or in the directory it names.
    """

    name: Literal["digits", "files", "glue", "natural-instructions", "dolly", "hub"] = "digits"
    path: PathName | None = None
    test_path: PathName | None = None
    subset: Name | None = None
    split: Name = "train"
    test_split: Name | None = None
    revision: Name | None = None
    tasks: list[Name] = []
    task: Literal["classification", "instruction"] = "classification"
    text: Name = "text"
    text_pair: Name | None = None
    label: Name = "label"
    prompt: Annotated[str, Field(min_length=1, max_length=100_000)] = PROMPT
    chat_user: Annotated[str, Field(min_length=1, max_length=100_000)] = CHAT_USER
    chat_system: Annotated[str, Field(max_length=100_000)] = ""
    output: Name = "output"
    max_length: Annotated[int, Field(ge=2, le=1_048_576)] = 128
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 32
    generated_rows: CountOrNone = 256
    shift: Literal["rotate90", "rotate180", "invert", "none"] = "rotate90"
    partition: Name = "dirichlet"
    partition_by: Name | None = None
    partition_options: dict[str, Any] = {}
    labels_per_client: Count = 2
    rows_per_client: CountOrNone = 0
    pretrain_fraction: Fraction = 0.4
    validation_fraction: FractionOrNone = 0.0
    test_fraction: Fraction = 0.25
    train_rows: CountOrNone = 0
    test_rows: CountOrNone = 0
    cache: bool | PathName = True

    @model_validator(mode="before")
    @classmethod
    def _infer(cls, values: Any) -> Any:
        """Fill in settings that follow from others, unless they are given: with a `path`, for example, name "files"."""
        if not isinstance(values, dict):
            return values
        inferred: dict[str, Any] = {}
        if "path" in values:
            inferred["name"] = "files"
        name = values.get("name", inferred.get("name", "digits"))
        if name != "digits":
            inferred["shift"] = "none"
        if name in INSTRUCTIONS:
            inferred["task"] = "instruction"
        subset = values.get("subset")
        if name == "glue" and isinstance(subset, str) and subset in GLUE:
            inferred["text"], inferred["text_pair"] = GLUE[subset]
            inferred["test_split"] = "validation_matched" if subset == "mnli" else "validation"
        return {**inferred, **values}

    @field_validator("partition")
    @classmethod
    def _known_partition(cls, value: str) -> str:
        if value in PARTITIONS or value.endswith("Partitioner"):
            return value
        known = ", ".join(map(repr, PARTITIONS))
        raise ValueError(
            f"data.partition is {shown(value)}: it should be {known} or a partitioner of flwr_datasets, e.g. "
            "'ShardPartitioner'"
        )

    @property
    def title(self) -> str:
        """A short name of the data, for tables and figures."""
        if self.name == "digits":
            return f"digits {_TURNED[self.shift]}"
        if self.name == "glue":
            return f"GLUE {self.subset}"
        source = Path(self.path).name if self.path else {"dolly": "Dolly"}.get(self.name, "Natural Instructions")
        return f"{source} {', '.join(self.tasks)}".strip()


def check_data(data: DataConfig, model: ModelConfig) -> None:
    """Raise ValueError, naming the key in one line, if settings of data and model are not compatible."""
    if data.rows_per_client and data.partition not in ("dirichlet", "iid"):
        raise ValueError(
            f"data.rows_per_client is {data.rows_per_client}: it goes with data.partition = 'dirichlet' or 'iid', not "
            f"{data.partition!r}"
        )
    for option, key in (("num_partitions", "clients.count"), ("partition_by", "data.partition_by")):
        if option in data.partition_options:
            raise ValueError(f"data.partition_options.{option} is set by {key}; it should not be given")
    chats = data.task == "instruction" and data.prompt == CHAT
    for key, usual in (("chat_system", ""), ("chat_user", CHAT_USER)):
        if not chats and (value := getattr(data, key)) != usual:
            raise ValueError(
                f"data.{key} is {shown(value)}: it goes with data.task = 'instruction' and data.prompt = {CHAT!r}"
            )
    if data.task != "instruction" and data.prompt == CHAT:
        raise ValueError(f"data.prompt is {CHAT!r}: it goes with data.task = 'instruction'")
    if data.name == "digits":
        _check_digits(data, model)
        return
    if model.path is None:
        raise ValueError("model.path is missing: text needs a local transformers checkpoint")
    if data.shift != "none":
        raise ValueError(f"data.shift is {data.shift!r}: text takes 'none'")
    if data.path is None and data.name in ("files", "hub"):
        needed = "a file or a folder" if data.name == "files" else "the data set's name"
        raise ValueError(f"data.path is missing: data.name = {data.name!r} needs {needed}")
    if data.name == "glue" and data.subset not in GLUE:
        raise ValueError(
            f"data.subset is {data.subset!r}: with data.name = 'glue' it should be one of {', '.join(GLUE)}"
        )
    if data.name == "glue" and data.task != "classification":
        raise ValueError("data.task is 'instruction': GLUE takes 'classification'")
    if data.tasks and data.name != "natural-instructions":
        raise ValueError(
            f"data.tasks is {shown(data.tasks)}: only data.name = 'natural-instructions' has tasks to choose from"
        )
    if data.test_path is not None and data.name != "files":
        raise ValueError(f"data.test_path is {data.test_path!r}: it goes with data.name = 'files'")
    if data.task == "instruction" and data.max_new_tokens > data.max_length - 2:
        raise ValueError(
            f"data.max_new_tokens is {data.max_new_tokens}: it should leave room for a prompt in data.max_length "
            f"({data.max_length})"
        )
    if (taken := data.test_fraction + data.validation_fraction) >= 1:
        raise ValueError(
            f"data.test_fraction + data.validation_fraction is {taken:g}: "
            "it should be below 1, for what is left goes to the clients"
        )


def _check_digits(data: DataConfig, model: ModelConfig) -> None:
    if model.attention != "auto":
        raise ValueError(f"model.attention is {model.attention!r}: the embedded ViT takes 'auto'")
    if data.path is not None:
        raise ValueError(f"data.path is {data.path!r}: the digits need no file; data.name should be 'files'")
    if model.path is not None:
        raise ValueError(f"model.path is {model.path!r}: digits train an embedded ViT; text needs data.path as well")
    if data.task != "classification":
        raise ValueError("data.task is 'instruction': digits take 'classification'")
    if data.partition_by is not None:
        raise ValueError(f"data.partition_by is {data.partition_by!r}: digits are dealt out by label")
    if (taken := data.test_fraction + data.pretrain_fraction + data.validation_fraction) >= 1:
        raise ValueError(
            f"data.test_fraction + data.pretrain_fraction + data.validation_fraction is {taken:g}: "
            "it should be below 1, for what is left goes to the clients"
        )
