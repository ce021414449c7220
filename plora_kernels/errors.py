"""Errors and warnings a caller can act on: each message names what is wrong and what would be right."""


class PLoRAError(ValueError):
    """Base class of every error this package raises about its inputs."""


class ShapeError(PLoRAError):
    """Tensors whose shapes do not fit together."""


class DTypeError(PLoRAError):
    """Tensors whose dtypes differ, or a dtype that is not supported."""


class DeviceError(PLoRAError):
    """Tensors on different devices."""


class RankError(PLoRAError):
    """A rank outside 1–256."""


class SelectionError(PLoRAError):
    """Module indices out of range or repeated, or a mask of the wrong length."""


class ConfigError(PLoRAError):
    """A configuration value that cannot be used."""


class TargetError(PLoRAError):
    """Target modules that do not exist or cannot be replaced."""


class StateError(PLoRAError):
    """An operation the layer's or weight's present state does not allow."""


class UnsupportedError(PLoRAError, NotImplementedError):
    """A use of the package that this version does not support."""


class PLoRAWarning(UserWarning):
    """Something that works, but perhaps not as the caller expects: for instance a module left without an adapter."""
