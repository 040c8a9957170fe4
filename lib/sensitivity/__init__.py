"""ALP's connection sensitivity: layer-by-layer gradients, the artifact, the run of `save_gradient.py`.

May import `config`, `data`, `engine`, `models`, `reporting`, `runtime`, `storage`, `files`, `version`
and `errors`.
"""
