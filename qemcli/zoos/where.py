"""The filter language of --where: comparisons over the columns of an index, never code.

lr < 0.1 and activation == 'relu'        step in (40, 86)        not final or config.seed % 2 == 0
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from qemcli.errors import UsageError
from qemcli.registry import suggest

if TYPE_CHECKING:
    import pandas

MAX_LENGTH = 2000
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.Mod: operator.mod,
}  # fmt: skip


def rows(index: pandas.DataFrame, expression: str) -> np.ndarray:
    """(n,) bool, True where the expression holds; no comparison with a missing value does.

    Raises UsageError for an unknown column or anything that is not a comparison of columns.
    """
    return _Filter(index, expression).mask()


class _Filter:
    def __init__(self, index: pandas.DataFrame, expression: str) -> None:
        self.index, self.expression = index, expression

    def mask(self) -> np.ndarray:
        if len(self.expression) > MAX_LENGTH:
            self._refuse("it is too long")
        try:
            tree = ast.parse(self.expression.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            self._refuse("it is no expression")
        try:
            return self._truth(self._value(tree))
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            self._refuse(str(error).splitlines()[0])

    def _refuse(self, reason: str, hint: str | None = None) -> NoReturn:
        hint = hint or "e.g. --where \"lr < 0.1 and activation == 'relu'\""
        raise UsageError(f"--where '{self.expression[:200]}': {reason}", hint) from None

    def _value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BoolOp):
            parts = [self._truth(self._value(value)) for value in node.values]
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return join.reduce(parts)
        if isinstance(node, ast.Compare):
            return self._compare(node)
        if isinstance(node, ast.UnaryOp):
            return self._unary(node)
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = self._value(node.left), self._value(node.right)
            if isinstance(left, str | tuple) or isinstance(right, str | tuple):
                self._refuse("arithmetic is for numbers")
            return _ARITHMETIC[type(node.op)](left, right)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
            return node.value
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return tuple(self._constant(item) for item in node.elts)
        return self._column(node)

    def _unary(self, node: ast.UnaryOp) -> Any:
        value = self._value(node.operand)
        if isinstance(node.op, ast.Not):
            return ~self._truth(value)
        if isinstance(node.op, ast.USub) and not isinstance(value, str | tuple):
            return -value
        self._refuse("an operator that it does not know")

    def _constant(self, node: ast.expr) -> Any:
        value = self._value(node)
        if not isinstance(value, bool | int | float | str):
            self._refuse("a list holds numbers or words")
        return value

    def _compare(self, node: ast.Compare) -> np.ndarray:
        left, result = self._value(node.left), np.ones(len(self.index), dtype=bool)
        for kind, item in zip(node.ops, node.comparators, strict=True):
            right = self._value(item)
            if isinstance(kind, ast.In | ast.NotIn):
                found = self._among(left, right)
                result &= ~found if isinstance(kind, ast.NotIn) else found
            elif type(kind) in _COMPARE:
                result &= self._known(left, right) & np.asarray(
                    _COMPARE[type(kind)](left, right), dtype=bool
                )
            else:
                self._refuse("a comparison that it does not know")
            left = right
        return result

    def _among(self, left: Any, right: Any) -> np.ndarray:
        if not isinstance(right, tuple) or not hasattr(left, "isin"):
            self._refuse("'in' needs a column and a list")
        return left.isin(right).to_numpy(dtype=bool)

    def _known(self, *values: Any) -> np.ndarray:
        """Where no operand is missing: NaN != 1 is not an answer."""
        known = np.ones(len(self.index), dtype=bool)
        for value in values:
            if hasattr(value, "notna"):
                known &= value.notna().to_numpy()
            elif isinstance(value, tuple):
                self._refuse("a list needs 'in'")
        return known

    def _truth(self, value: Any) -> np.ndarray:
        if isinstance(value, bool):
            return np.full(len(self.index), value)
        kind = getattr(value, "dtype", None)
        if kind is None or str(kind) not in ("bool", "boolean"):
            self._refuse("it compares nothing")
        return np.asarray(value, dtype=bool)

    def _column(self, node: ast.expr) -> pandas.Series:
        name = _dotted(node)
        if name is None:
            self._refuse(f"{type(node).__name__} is not allowed in a filter")
        columns = [str(c) for c in self.index.columns]
        for known in (name, f"config.{name}"):
            if known in columns:
                return self.index[known]
        short = {c.removeprefix("config."): c for c in columns}
        self._refuse(f"no column is called '{name}'", suggest(name, sorted(short)))


def _dotted(node: ast.expr) -> str | None:
    """`config.lr` as it is written, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = _dotted(node.value)
        return f"{left}.{node.attr}" if left else None
    return None
