"""The calibration engine: hidden states of many windows through the decoder layers, and their losses.

May import `config`, `models`, `runtime` and `errors`.
"""
