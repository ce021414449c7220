"""The configuration's tables `[model]` and `[data]`, and what of them goes together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from fed.config.fields import TABLE, Count, CountOrNone, Fraction, FractionOrNone, Positive

# The columns that make a text or a pair of texts of a GLUE task.
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
PROMPT = "{instruction}\n\nInput: {input}\n\nOutput:\n"
PARTITIONS = ("dirichlet", "iid", "pathological", "natural")

_TURNED = {"rotate90": "turned by 90°", "rotate180": "turned by 180°", "invert": "inverted", "none": "undisturbed"}


class ModelConfig(BaseModel):
    """The base model: a local checkpoint, or without `path` a small ViT trained on undisturbed digits."""

    model_config = TABLE

    path: str | None = None
    pretrain_steps: Annotated[int, Field(ge=1, le=100_000)] = 500
    pretrain_learning_rate: Positive = 2e-3
    pretrain_batch_size: Count = 16


class DataConfig(BaseModel):
    """The task: where its rows come from, what is made of them, and how they are dealt out.

    `name` says where rows come from. "digits": in scikit-learn. "files": `path`, a JSONL, CSV or Parquet file or a
    folder of one kind of them; with `test_path` tested on that. "natural-instructions": `path`, a folder of JSONL
    files, one for each task, or the hub; `tasks` names those to use. "glue" (`subset` is the task), "dolly" and
    "hub" (`path` is the name there) come through the library `datasets`, from `split`, and are tested on
    `test_split` where there is one; `path` may be a local copy.

    `task`: "classification" of the column `text` (with `text_pair`) into the values of `label`, or "instruction":
    a causal language model answers `prompt`, in which {column} stands for a row's value and lines whose columns are
    empty are left out, with the column `output`, in at most `max_new_tokens` tokens.

    `partition` deals rows to clients by the values of `partition_by`, without it by label: "dirichlet"
    (`clients.dirichlet_alpha`), "iid", "pathological" (`labels_per_client`), "natural" (a value is never split), or the
    name of a partitioner of `flwr_datasets`, given `partition_options`. With `rows_per_client` above 0 every client
    draws so many rows, whoever else has them. `train_rows` and `test_rows` draw so many rows; 0 takes all. `cache`
    keeps tokens in the user's cache directory (true), nowhere (false), or in the directory it names.
    """

    model_config = TABLE

    name: Literal["digits", "files", "glue", "natural-instructions", "dolly", "hub"] = "digits"
    path: str | None = None
    test_path: str | None = None
    subset: str | None = None
    split: str = "train"
    test_split: str | None = None
    revision: str | None = None
    tasks: list[str] = []
    task: Literal["classification", "instruction"] = "classification"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    prompt: Annotated[str, Field(min_length=1)] = PROMPT
    output: str = "output"
    max_length: Annotated[int, Field(ge=2, le=32_768)] = 128
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 32
    generated_rows: CountOrNone = 256
    shift: Literal["rotate90", "rotate180", "invert", "none"] = "rotate90"
    partition: str = "dirichlet"
    partition_by: str | None = None
    partition_options: dict[str, Any] = {}
    labels_per_client: Count = 2
    rows_per_client: CountOrNone = 0
    pretrain_fraction: Fraction = 0.4
    validation_fraction: FractionOrNone = 0.0
    test_fraction: Fraction = 0.25
    train_rows: CountOrNone = 0
    test_rows: CountOrNone = 0
    cache: bool | str = True

    @model_validator(mode="before")
    @classmethod
    def _infer(cls, values: Any) -> Any:
        """Fill in what follows from the source, where the file does not say otherwise: a path means files."""
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
        if name == "glue" and values.get("subset") in GLUE:
            subset = values["subset"]
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
            f"data.partition is {value!r}: it should be {known} or a partitioner of flwr_datasets, e.g. "
            "'ShardPartitioner'"
        )

    @property
    def title(self) -> str:
        """The task in a few words."""
        if self.name == "digits":
            return f"digits {_TURNED[self.shift]}"
        if self.name == "glue":
            return f"GLUE {self.subset}"
        source = Path(self.path).name if self.path else {"dolly": "Dolly"}.get(self.name, "Natural Instructions")
        return f"{source} {', '.join(self.tasks)}".strip()


def check_data(data: DataConfig, model: ModelConfig) -> None:
    """Raise ValueError, one line that names the key, where the settings of data and model do not go together."""
    if data.rows_per_client and data.partition not in ("dirichlet", "iid"):
        raise ValueError(
            f"data.rows_per_client is {data.rows_per_client}: it goes with data.partition = 'dirichlet' or 'iid', not "
            f"{data.partition!r}"
        )
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
            f"data.tasks is {data.tasks}: only data.name = 'natural-instructions' has tasks to choose from"
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
