"""How a run goes from settings to result: the skeleton of a single run, and grids of runs.

May import `config`, `data`, `engine`, `evaluation`, `export`, `models`, `reporting`, `runtime`, `storage`, `files`,
`version` and `errors`.
"""
