"""Modules: drop-in twins of torch's and torchvision's, with the same constructors, parameters and state_dict keys."""

from .norm import BatchNormAct2d

__all__ = ["BatchNormAct2d"]
