"""Files of tensors with a digest of each, for resume state: what was changed since is refused."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.errors import START_OVER, InputError
from lib.files import parse_json
from lib.storage.atomic import atomic_file

_DIGESTS, _CONTENT = "digests", "content"  # of the metadata


def save_sealed(path: Path, tensors: Mapping[str, torch.Tensor], owner: str, content: object = None) -> None:
    """Writes tensors and JSON content atomically; `owner` names what they are a part of, as to `Sealed`."""
    text = json.dumps(content, allow_nan=False)
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    metadata = {_CONTENT: text, _DIGESTS: json.dumps({**digests, "": _digest_of_content(path, owner, text)})}
    with atomic_file(path) as draft:
        save_file(dict(tensors), draft, metadata)


class Sealed:
    """A file that `save_sealed` wrote."""

    def __init__(self, path: Path, owner: str):
        """Reads all but the tensors. Raises `InputError` unless owner, names and content are as they were written."""
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata, self.names = file.metadata() or {}, list(file.keys())
            self._digests: dict[str, str] = parse_json(metadata[_DIGESTS].encode())
            text = metadata[_CONTENT]
            if {*self.names, ""} != set(self._digests) or self._digests[""] != _digest_of_content(path, owner, text):
                raise ValueError("its digest does not match")
            self.content = parse_json(text.encode())
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise broken(path, error) from error

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU. Raises `InputError` unless it is as it was written."""
        try:
            with safe_open(self.path, framework="pt") as file:
                found = file.get_tensor(name)
            if _digest(found) != self._digests[name]:
                raise ValueError(f"the digest of {name} does not match")
        except (SafetensorError, OSError, ValueError) as error:
            raise broken(self.path, error) from error
        return found


def broken(path: Path, error: Exception) -> InputError:
    """The error for a file of resume state that cannot be used."""
    return InputError(f"{path}: broken, so that run cannot go on ({error}); {START_OVER}")


def _digest_of_content(path: Path, owner: str, text: str) -> str:
    return hashlib.sha256(f"{owner} {path.name} {text}".encode()).hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    values = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    found.update(values.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
