"""Which sources a compiled library is of: `setup.py` puts a fingerprint of the C files into it, and
`library.py` holds that against the files that lie beside it.
"""

import hashlib
from pathlib import Path


def fingerprint(folder: Path) -> str:
    """Of all C files in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
