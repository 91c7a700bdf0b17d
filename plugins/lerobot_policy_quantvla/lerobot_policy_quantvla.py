"""Registers the policy type ``quantvla`` with lerobot, which imports this module by its name."""

from quantvla.lerobot_policy.configuration_quantvla import QuantVLAConfig

__all__ = ["QuantVLAConfig"]
