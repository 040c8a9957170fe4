"""The calibration engine: hidden states of many windows through the decoder layers, and their losses.

Imports `models`, `runtime`, `config` and `errors`.
"""
