"""The bundled demo: a small trained Llama (`model/`), its text (`text.py`), its training script (`train.py`)."""

from pathlib import Path

DEMO_MODEL = Path(__file__).resolve().parent / "model"
