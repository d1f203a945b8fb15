"""Settings of a command as one frozen dataclass: flags and the job's identity follow from it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from encdec.errors import ConfigError


def setting(
    default: Any,
    about: str,
    *,
    identity: bool = False,
    least: int | None = None,
    needs: str = "",
    **flag: Any,
) -> Any:
    """A field of a ``Settings``, whose flag ``--NAME`` has the help ``about``.

    ``identity``: it decides the bytes that are written; ``least``: the smallest integer it may be;
    ``needs``: "NAME=VALUE" of the field without which it has no effect; ``flag``: what else
    ``argparse.ArgumentParser.add_argument`` takes.
    """
    if isinstance(default, bool):
        flag["action"] = "store_true"
    elif least is not None:
        flag.setdefault("type", int)
    metadata = {
        "flag": {"help": about, **flag},
        "identity": identity,
        "least": least,
        "needs": needs,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of a command's settings; every field is a ``setting``."""

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """A flag for each field; those not given have its default, or none where the parser
        suppresses them."""
        suppressed = parser.argument_default == argparse.SUPPRESS
        for field in dataclasses.fields(cls):
            default: dict[str, Any] = {} if suppressed else {"default": field.default}
            parser.add_argument(f"--{field.name}", **field.metadata["flag"], **default)

    def check(self) -> None:
        """ConfigError for a number that is out of range, or a value without effect."""
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata["least"]
            self._check_needed(field, value)
            if least is None or value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{field.name} is {value!r}; expected an integer, {least} or more"
                )

    def _check_needed(self, field: dataclasses.Field[Any], value: Any) -> None:
        needed, _, wanted = field.metadata["needs"].partition("=")
        if needed and value != field.default and (seen := getattr(self, needed)) != wanted:
            raise ConfigError(
                f"{field.name} is {value!r}, which has no effect with {needed} {seen!r}; leave it "
                f"out, or set {needed} to {wanted!r}"
            )

    def identity(self) -> dict[str, Any]:
        """The fields that decide what is written."""
        fields = (f for f in dataclasses.fields(self) if f.metadata["identity"])
        return {field.name: getattr(self, field.name) for field in fields}
