"""Starts the engine process, by the host alone: `launch.py SOCKET_FD PROGRESS_FD [TOKENS_FD]`.

The interpreter need not be the worker's, so nothing is imported from beside this package: what the
engine needs must be the interpreter's own.
"""

import importlib.util
import sys
from pathlib import Path

APP = Path(__file__).resolve().parents[2]


def take_app() -> None:
    """Make `app` importable, and nothing that lies beside it."""
    spec = importlib.util.spec_from_file_location(
        "app", APP / "__init__.py", submodule_search_locations=[str(APP)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["app"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if sys.version_info < (3, 11):  # noqa: UP036  (it may be another one than ours)
    sys.exit(f"The engine process needs Python 3.11 or newer; {sys.executable} is older.")
sys.path = [entry for entry in sys.path if entry != str(Path(__file__).parent)]
take_app()

if __name__ == "__main__":
    try:
        from app.worker.engine.process import main
    except ImportError as error:
        sys.exit(f"The engine process needs the module {error.name}; {sys.executable} has none.")
    main()
