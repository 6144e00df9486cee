"""Load the compiled parts: `sparse24._C` and the op library beside it, which registers ``torch.ops.sparse24``."""

import ctypes
from pathlib import Path

import torch


def _load() -> tuple[str, str]:
    """Return the version and the path of what was loaded."""
    path: Path | None = None
    target = "unknown"
    try:
        # torch is imported by now: the libraries it has loaded are the ones the op library needs.
        from sparse24 import _C

        target = _C.build_info()["torch_target"]
        # Beside _C, not beside this file: an editable install keeps the two in different folders.
        path = Path(_C.__file__).with_name("libsparse24_torch.so")
        torch.ops.load_library(path)
        # A failed allocation inside an op crosses from C++ as this type.
        set_type = ctypes.CDLL(str(path)).sparse24_set_out_of_memory_type
        set_type(ctypes.c_void_p(id(torch.OutOfMemoryError)))
    except (ImportError, OSError) as error:
        raise ImportError(
            f"sparse24 cannot load its compiled part {path or 'sparse24._C'} under torch {torch.__version__} "
            f"(built for torch >= {target}): {error}"
        ) from error
    return _C.version, str(path)


#: LIBRARY_PATH is the file of the ops: C++ programs load the same one.
VERSION, LIBRARY_PATH = _load()
