"""Robots that `quantvla run` can drive, besides one's own."""
