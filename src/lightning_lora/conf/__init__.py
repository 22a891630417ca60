"""Points a source checkout's ``lightning_lora.conf`` at the repository's top-level ``conf/`` folder.

The wheel leaves this file out and ships ``conf/`` in its place. An editable install imports from ``src/``,
and Hydra asks the package's loader where its files are: so the loader is told the folder that people edit.
No copy, no link.
"""

from importlib.machinery import SourceFileLoader
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[3] / "conf"

__path__ = [str(_FOLDER)]
if __spec__ is not None:
    __spec__.loader = SourceFileLoader(__name__, str(_FOLDER / "__init__.py"))
    __spec__.submodule_search_locations = __path__
