"""ALP's connection sensitivity: gradients layer by layer, their file, the run of `save_gradient.py`.

May import `config`, `data`, `engine`, `models`, `reporting`, `runtime`, `storage` and `errors`.
"""
