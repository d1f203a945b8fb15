"""Models of transformers, loaded from a directory, completely or not at all."""

from __future__ import annotations

import os
from typing import Any

from encdec.errors import DataError

# For every from_pretrained: without the second, transformers asks at the terminal whether it may
# run code that comes with a model.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def why_unread(error: Exception) -> str:
    """What transformers says of a model that it does not load, without advice to run its code."""
    if "trust_remote_code" in str(error):
        return (
            "it needs code that comes with it, which is not run here; give a model of a family "
            "that transformers has, or instead of an export the work directory"
        )
    return str(error)


def load_causal_model(directory: str | os.PathLike[str], **options: Any) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` of a local directory.

    transformers draws weights that the files lack, with a warning alone; here that is an error.

    Args:
        directory: of the model.
        options: for ``from_pretrained``.

    Raises:
        DataError: weights are missing, or of another shape than the configuration says.
        OSError, ValueError: from transformers, where there is no such model.
    """
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **LOCAL, **options
    )
    model, found = loaded
    missing = sorted(found["missing_keys"])
    misshapen = sorted(str(key[0]) for key in found.get("mismatched_keys", ()))
    if missing or misshapen:
        names = missing + misshapen
        shown = ", ".join(names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6)
        raise DataError(
            f"the weights in {directory} lack {shown}, or have them in another shape; transformers "
            f"{transformers.__version__} would initialize them randomly: give the model's complete "
            "directory, or a version of transformers that knows it"
        )
    return model
