"""How each series of a ladder is named and drawn: colour, marker and line, also for print.

Colours are Okabe and Ito's, distinguishable with the common kinds of colour blindness.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from matplotlib.axes import Axes

from encdec.scaling.matching import is_distilled, plain_name


@dataclasses.dataclass(frozen=True)
class SeriesStyle:
    """Style of a series; a series with a teacher is drawn like its plain one with filled
    markers."""

    colour: str
    marker: str
    line: str | tuple
    filled: bool = False

    @property
    def points(self) -> dict:
        return {
            "marker": self.marker,
            "color": self.colour,
            "markersize": 4.5,
            "markerfacecolor": self.colour if self.filled else "white",
            "markeredgewidth": 1.1,
            "linestyle": "none",
        }

    def draw(self, axes: Axes, x, y, ends=None, **how) -> None:
        """A line, with a band between the two rows of ``ends``."""
        axes.plot(x, y, **({"color": self.colour, "linestyle": self.line, "linewidth": 1.8} | how))
        if ends is not None:
            axes.fill_between(x, *ends, color=self.colour, alpha=0.13, linewidth=0)


_LOOKS = [
    SeriesStyle("#0072B2", "o", "-"),
    SeriesStyle("#009E73", "s", "--"),
    SeriesStyle("#CC79A7", "^", "-."),
    SeriesStyle("#E69F00", "v", ":"),
    SeriesStyle("#56B4E9", "P", (0, (5, 1))),
]
_DECODER_LOOK = SeriesStyle("#D55E00", "D", (0, (3, 1, 1, 1)))
_DISTILLED = [  # marker (the plain series' own, or another) and line, by teacher
    ("", (0, (1, 1))),
    ("X", (0, (5, 1, 1, 1, 1, 1))),
    ("*", (0, (1, 3))),
    ("h", (0, (4, 4))),
]


def styles_of(series: Iterable[str]) -> dict[str, SeriesStyle]:
    """The style of each series, by name."""
    names = list(series)
    plain = dict.fromkeys(plain_name(name) for name in names)
    paired = [name for name in plain if name.startswith("ed-")]
    looks = {name: _LOOKS[i % len(_LOOKS)] for i, name in enumerate(paired)}
    looks |= {name: _DECODER_LOOK for name in plain if name not in looks}
    teachers: dict[str, int] = {}
    for name in names:
        if is_distilled(name):
            number = teachers.setdefault(name.partition("+")[2], len(teachers))
            marker, line = _DISTILLED[number % len(_DISTILLED)]
            look = looks[plain_name(name)]
            looks[name] = SeriesStyle(look.colour, marker or look.marker, line, filled=True)
    return looks


def label_of(name: str) -> str:
    """Label of ``ed-2of3``: encoder-decoder 2/3-1/3; with a teacher: + KD, and its name."""
    plain, _, teacher = name.partition("+")
    if teacher:
        return f"{label_of(plain)} + KD" + (f" ({teacher})" if teacher != "kd" else "")
    if not name.startswith("ed-"):
        return "decoder-only" if name == "dec" else name
    above, _, below = name.removeprefix("ed-").partition("of")
    return f"encoder-decoder {above}/{below}-{int(below) - int(above)}/{below}"
