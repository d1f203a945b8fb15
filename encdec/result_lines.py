"""What a line of measured results says in addition to the numbers: settings, machine and date."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any


def setting_digest(identity: Mapping[str, Any]) -> str:
    """Names the settings that decide a run."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def where_and_when() -> dict[str, str]:
    """Device and date."""
    # Imported late: it takes half a second.
    import jax

    return {
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }
