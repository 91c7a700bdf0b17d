"""QuantVLA: an edge quantization compiler for Vision-Language-Action models."""

__version__ = "0.1.0"
