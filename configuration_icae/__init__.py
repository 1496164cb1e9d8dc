"""What an ICAE is: `ICAEConfig`."""

from .configuration_icae import ICAEConfig


__all__ = ["ICAEConfig"]
