"""Checkpoints of transformers' `Trainer` that hold the adapter alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plora_kernels.errors import ConfigError, PLoRAWarning, StateError, UnsupportedError
from plora_kernels.nn.adapter_files import CONFIG_NAME
from plora_kernels.nn.injected import Injected
from plora_kernels.nn.peft_loading import load_into
from plora_kernels.nn.peft_saving import save_peft
from plora_kernels.nn.targets import is_within, shortened

_ARGUMENTS_NAME = "training_args.bin"  # as the Trainer calls them


class AdapterCheckpoints:
    """Make a `Trainer` of transformers, or one that is made of it, save and load the adapter in place of the model.

    Name it first among the bases, and give the trainer what `inject` or `load_peft` returned in place of a model.
    `checkpoint-N/` then holds `adapter_config.json` and `adapter_model.safetensors`, as `save_peft` writes them, beside
    the state of optimiser, scheduler and random numbers, and so does the folder of `save_model`. Training goes on from
    it as if it had not stopped, and `load_best_model_at_end` loads the best adapter. A checkpoint of a whole model,
    made without this class, is resumed from as well. Select the same modules before resuming as before saving: an
    adapter's files hold all modules, and do not say which are selected. Quantised models, which a Trainer refuses
    unless PEFT put adapters into them, are trained too.

    A callback could not do this: the Trainer saves before it calls one, and where it resumes it looks for the whole
    model, unless that is PEFT's own, and calls none. The methods overridden here (`_save`, `_load_best_model`,
    `_load_from_checkpoint`) are those with which it saves and loads a model.

    Raises:
        ConfigError: the model is no handle; or the class is not named first.
        StateError: parameters are trained that an adapter's files do not hold; the trainer replaced the model; TRL
            would pass over an adapted output layer; or the handle's adapter was taken out.
        UnsupportedError: the model is divided by FSDP or DeepSpeed.

    >>> import os, tempfile
    >>> from transformers import Trainer, TrainingArguments
    >>> from plora_kernels.nn.inject import PLoRAConfig, inject
    >>> class AdapterTrainer(AdapterCheckpoints, Trainer):
    ...     pass
    >>> handle = inject(nn.Sequential(nn.Linear(8, 8)), PLoRAConfig(rank=2, target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AdapterTrainer(handle, args=TrainingArguments(folder, report_to=[], use_cpu=True)).save_model()
    ...     sorted(os.listdir(folder))
    ['adapter_config.json', 'adapter_model.safetensors', 'training_args.bin']
    """

    save_embedding_layers: bool | str = "auto"  # as `save_peft` takes it
    adapter: Injected
    model: Any
    args: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for kind in cls.__mro__[: cls.__mro__.index(AdapterCheckpoints)]:
            if not issubclass(kind, AdapterCheckpoints):
                raise ConfigError(
                    f"{cls.__name__} names {kind.__name__} before AdapterCheckpoints, which has to be first"
                )

    def __init__(self, model: Injected, *arguments: Any, **options: Any) -> None:
        if not isinstance(model, Injected):
            kind = type(model).__name__
            raise ConfigError(f"the trainer got a {kind} for a model; give it what inject or load_peft returned")
        model.check_present()
        self.adapter = model
        above: Any = super()
        with _accepted(model.model):
            above.__init__(model.model, *arguments, **options)
        trainer: Any = self
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UnsupportedError("FSDP and DeepSpeed divide the model; adapters are saved of whole ones only")
        if self.model is not model.model:
            raise StateError("the trainer put another model in place of the adapted one; leave out its peft_config")
        self._refuse_others()
        self._refuse_adapted_head()
        self._warn_of_statistics()

    def _refuse_others(self) -> None:
        """Raise StateError if parameters are trained that are neither factors nor in a module that is saved whole."""
        known = {id(factor) for layer in self.adapter.layers.values() for factor in (layer.lora_A, layer.lora_B)}
        for name in self.adapter.saved_modules:
            known |= {id(parameter) for parameter in self.adapter.model.get_submodule(name).parameters()}
        parameters = self.adapter.model.named_parameters()
        others = [name for name, parameter in parameters if parameter.requires_grad and id(parameter) not in known]
        if others:
            raise StateError(
                f"{shortened(others)} are trained, but an adapter's files do not hold them: name their modules in "
                "modules_to_save, or freeze them"
            )

    def _refuse_adapted_head(self) -> None:
        """Raise StateError if TRL would train an adapter of the output layer, whose weight it reads past the layer."""
        if all(kind.__module__.partition(".")[0] != "trl" for kind in type(self).__mro__):
            return
        model: Any = self.adapter.model
        head = model.get_output_embeddings()
        for name, layer in self.adapter.layers.items():
            if layer is head:
                raise StateError(
                    f"{name!r} is adapted, but TRL computes log-probabilities from its weight directly, so that its "
                    "adapter would have no effect; leave it out of the targets"
                )

    def _warn_of_statistics(self) -> None:
        """Warn of running statistics that change in training and are not in an adapter's files either."""
        names = [
            name
            for name, module in self.adapter.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            and module.running_mean is not None
            and not is_within(self.adapter.saved_modules, name)
        ]
        if names:
            warnings.warn(
                f"{shortened(names)} keep running statistics, which change in training and are not in an adapter's "
                "files: put them in evaluation mode, or name them in modules_to_save",
                PLoRAWarning,
                stacklevel=3,
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the adapter, the tokenizer or processor and the arguments, as the Trainer does with a `PeftModel`."""
        if not self.args.should_save:
            return
        self._refuse_others()
        folder = save_peft(
            self.adapter, output_dir or self.args.output_dir, save_embedding_layers=self.save_embedding_layers
        )
        processor = getattr(self, "processing_class", None)
        if processor is None:
            processor = getattr(getattr(self, "data_collator", None), "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(folder)
        torch.save(self.args, folder / _ARGUMENTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the adapter of a checkpoint, or the whole model of one that has it."""
        if Path(resume_from_checkpoint, CONFIG_NAME).is_file():
            load_into(self.adapter, resume_from_checkpoint)
        else:
            above: Any = super()
            above._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the adapter of the best checkpoint, or the whole model of one that has it."""
        trainer: Any = self
        best = trainer.state.best_model_checkpoint
        if Path(best, CONFIG_NAME).is_file():
            load_into(self.adapter, best)
        else:
            above: Any = super()
            above._load_best_model()


@contextmanager
def _accepted(model: nn.Module) -> Iterator[None]:
    """Within the context, have the Trainer take a quantised model: it takes only those that PEFT put adapters into."""
    mark, quantized = "_hf_peft_config_loaded", getattr(model, "is_quantized", False)
    if not quantized or getattr(model, mark, False):
        yield
        return
    setattr(model, mark, True)
    try:
        yield
    finally:
        delattr(model, mark)  # that of the class is false
