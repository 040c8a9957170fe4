"""The calibration engine: runs windows of tokens through the decoder layers and computes their losses.

May import `config`, `models`, `runtime` and `errors`.
"""
