"""The settings of ALP's gradients, and the file name that they give. Imports no torch."""

import hashlib
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.config.mixture import Mixture
from lib.config.sources import expand, is_demo, is_hub_model, parse_text, short_name
from lib.files import read_json

FORMAT = "connection-sensitivity/2"
GRADIENT_TYPES = ("l2", "l1", "l2_hundred_total")
GRADIENT_LOSSES = ("last", "all")


@dataclass(frozen=True)
class GradientSettings:
    """What sensitivities depend on besides the model: text, windows, and how gradients are computed and summed."""

    dataset: Mixture
    nsamples: int = 10
    seqlen: int = 64
    loss: str = "last"
    gradient_type: str = "l2"
    seed: int = 0

    def path(self, model: str, dtype: str = "auto") -> Path:
        """The file for the sensitivities of a model with these settings, in the folder `gradients`."""
        name = model.replace("/", "--")[:80] if is_hub_model(model) else _local_label(model)
        windows = f"{self.nsamples}x{self.seqlen}"
        parts = [name, self.gradient_type, windows, self.loss, _text_label(self.dataset), f"seed{self.seed}"]
        file = "-".join(parts + [dtype] * (dtype != "auto"))
        return Path("gradients") / (re.sub(r"[/:]+", "--", file) + ".json")

    def as_json(self) -> dict[str, Any]:
        """The fields by name, as files have them: the texts in one string."""
        return asdict(self) | {"dataset": str(self.dataset)}


def is_ours(path: Path) -> bool:
    """True for a file of gradients of any version; only such a file is ever replaced."""
    with suppress(OSError, ValueError):
        return is_content_of_ours(read_json(path))
    return False


def is_content_of_ours(content: object) -> bool:
    """True for what a file of gradients of any version holds."""
    return isinstance(content, dict) and str(content.get("format")).startswith(FORMAT.partition("/")[0])


def _text_label(dataset: Mixture) -> str:
    """The names of texts; those of several are followed by a digest of names and shares."""
    names = [_local_label(text) if parse_text(text).path.exists() else text[:80] for text in dataset.texts]
    if len(names) == 1:
        return names[0]
    digest = hashlib.sha256(f"{names} {dataset.shares}".encode())
    return f"{'+'.join(names)[:80]}-{digest.hexdigest()[:6]}"


def _local_label(name: str) -> str:
    """The last part of a path with a digest of the whole path; `demo` stays as it is."""
    if name == "demo" or is_demo(name):
        return "demo"
    path = str(expand(name).resolve())
    return f"{short_name(name)[:80]}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"
