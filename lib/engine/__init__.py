"""The calibration engine: runs windows of tokens through the decoder layers and computes their losses.

Imports `models`, `runtime`, `config` and `errors`.
"""
