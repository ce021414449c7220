"""What tensors there are now."""

import gc
import warnings

import torch


def tensor_bytes() -> int:
    """Return the bytes of every tensor that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some libraries' objects deprecates them
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor):
                storage = found.untyped_storage()
                try:
                    storages[storage.data_ptr()] = storage.nbytes()
                except RuntimeError:  # a compiler's stand-in for a tensor: there is no memory behind it
                    continue
    return sum(storages.values())
