"""What a file is that should have been a safetensors file, and what to do about it.

People point loaders at what a browser, git or another program left them. The first bytes tell most of these apart.
"""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 512  # as much as `what_is` wants to see

_DOWNLOAD = "download it again, such as with `hf download`"
_SAFETENSORS = "use the model's safetensors files"


def what_is(head: bytes) -> tuple[str, str] | None:
    """What begins like this, and the remedy; None where nothing known does."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, in place of the file", "run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page", f"the address was not the file's, or asked for a login; {_DOWNLOAD}"
    if head.startswith((b"GGUF", b"GGML", b"ggjt", b"tjgg")):
        return "a GGUF file, whose blocks are laid out otherwise", f"{_SAFETENSORS} from which it was made"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "a zip archive, as torch.save writes", f"{_SAFETENSORS}, or write its tensors with safetensors.torch"
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return "a Python pickle, as torch.save writes", f"{_SAFETENSORS}; a pickle can run code and is not opened"
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")) or head[257:262] == b"ustar":
        return "a compressed or tar archive", "unpack it"
    if head.startswith(b"\x93NUMPY"):
        return "a NumPy file", _SAFETENSORS
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file", _SAFETENSORS
    if text.startswith((b"{", b"[")):
        return "JSON text", f"give the directory where the weights lie; if it is a server's error message, {_DOWNLOAD}"
    return None


def missing(path: Path) -> str | None:
    """Why a path that does not exist does not, where that can be known."""
    if path.is_symlink():
        target = path.readlink()
        return f"{path} is a link to {target}, and there is no such file: the cache was cleared or moved; {_DOWNLOAD}"
    for parent in path.parents:
        if parent.is_symlink() and not parent.exists():
            return f"{parent} is a link to {parent.readlink()}, and there is no such folder"
    text = str(path)
    if not path.is_absolute() and text.count("/") == 1 and not text.startswith(".") and not path.parent.exists():
        return (
            f"there is no {path} here; if it is a model's name on the Hub, `hf download {path}` prints where it put it"
        )
    return None


def other_formats(folder: Path) -> str | None:
    """What a folder without safetensors files holds in their place."""
    kinds = {
        "*.gguf": ("GGUF", f"{_SAFETENSORS} from which it was made"),
        "*.bin": ("PyTorch pickles", f"{_SAFETENSORS}; pickles can run code and are not opened"),
        "*.pt": ("PyTorch pickles", f"{_SAFETENSORS}; pickles can run code and are not opened"),
        "*.pth": ("PyTorch pickles", f"{_SAFETENSORS}; pickles can run code and are not opened"),
        "*.safetensors.incomplete": ("a download that did not end", "let it end, or start it again"),
        "*.incomplete": ("a download that did not end", "let it end, or start it again"),
    }
    for pattern, (what, remedy) in kinds.items():
        if next(folder.glob(pattern), None) is not None:
            return f"it holds {what} ({pattern}); {remedy}"
    snapshots = sorted(folder.glob("snapshots/*"))
    if snapshots:
        return f"it is the folder of a Hub cache; give {snapshots[-1]}"
    inside = [part for part in sorted(folder.iterdir()) if part.is_dir() and next(part.glob("*.safetensors"), None)]
    if inside:
        return f"there are safetensors files in {inside[0]}"
    return None
