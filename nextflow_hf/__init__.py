"""NextFlow-HF."""

from pathlib import Path

__version__ = "0.1.0"

# In a bare checkout the sub-packages lie beside this folder, not in it (see `package_dir` in setup.cfg).
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file():
    __path__.append(str(_root))
