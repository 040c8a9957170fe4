"""The bundled demo: a small trained Llama (`model/`), the text it is used on (`text.py`), the script that made it.

May import nothing of `lib`.
"""

from pathlib import Path

DEMO_MODEL = Path(__file__).resolve().parent / "model"
