"""The weight space of a zoo whose networks are all alike, told by the first of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from qemcli.errors import InputError, QemError
from qemcli.spaces import WeightSpace

SAMPLE = 9  # networks whose tensors say what the zoo's are


def usual(
    kind: str,
    path: Path,
    names: Iterable[str],
    read: Callable[[str], WeightSpace],
    failures: Sequence[Mapping[str, str]],
) -> WeightSpace:
    """The space that most of the first networks have; what has another is named when it is read.

    `kind` is what a message calls the networks. Raises InputError where none of them can be read.
    """
    spaces, reasons = [], list(failures)
    for name in sorted(names):
        try:
            spaces.append(read(name))
        except QemError as error:
            reasons.append({"checkpoint": name, "reason": error.message})
        if len(spaces) == SAMPLE:
            break
    if not spaces:
        first = f"; the first: {': '.join(reasons[0].values())}" if reasons else ""
        raise InputError(f"{path}: none of its {len(reasons)} {kind} can be read{first}")
    common = Counter(tuple(space.shapes.items()) for space in spaces).most_common(1)[0][0]
    return next(one for one in spaces if tuple(one.shapes.items()) == common)
