"""PEFT's own LoRA layers with a fused forward: the class of each layer is swapped in place, and nothing else changes.

Parameters, names, state dicts, optimisers and file formats stay PEFT's. `fuse.py` swaps the classes; `layer.py` is
the layer, `conditions.py` decides at every call whether it is a plain one, and all others go to PEFT's forward.
"""
