"""The settings of ALP's gradients, and the file name that they give. Imports no torch."""

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lib.config.sources import expand, is_demo, is_hub_model, parse_text, short_name
from lib.files import read_json

FORMAT = "connection-sensitivity/2"
GRADIENT_TYPES = ("l2", "l1", "l2_hundred_total")
GRADIENT_LOSSES = ("last", "all")


@dataclass(frozen=True)
class GradientSettings:
    """What sensitivities depend on besides the model: text, windows, and how gradients are computed and summed."""

    dataset: str
    nsamples: int = 10
    seqlen: int = 64
    loss: str = "last"
    gradient_type: str = "l2"
    seed: int = 0

    def path(self, model: str, dtype: str = "auto") -> Path:
        """The file for the sensitivities of a model with these settings, in the folder `gradients`."""
        name = model.replace("/", "--")[:80] if is_hub_model(model) else _local_label(model)
        text = _local_label(self.dataset) if parse_text(self.dataset).path.exists() else self.dataset[:80]
        windows = f"{self.nsamples}x{self.seqlen}"
        parts = [name, self.gradient_type, windows, self.loss, text, f"seed{self.seed}"]
        file = "-".join(parts + [dtype] * (dtype != "auto"))
        return Path("gradients") / (re.sub(r"[/:]+", "--", file) + ".json")


def is_ours(path: Path) -> bool:
    """True for a file of gradients of any version; only such a file is ever replaced."""
    with suppress(OSError, ValueError):
        return is_content_of_ours(read_json(path))
    return False


def is_content_of_ours(content: object) -> bool:
    """True for what a file of gradients of any version holds."""
    return isinstance(content, dict) and str(content.get("format")).startswith(FORMAT.partition("/")[0])


def _local_label(name: str) -> str:
    """The last part of a path with a digest of the whole path; `demo` stays as it is."""
    if name == "demo" or is_demo(name):
        return "demo"
    path = str(expand(name).resolve())
    return f"{short_name(name)[:80]}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"
