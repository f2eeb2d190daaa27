"""The wrong programs that mutation testing tries: a module's text with one small change each.

The operators are cosmic-ray's, with the replacements of OPERATORS only (all of them would be six times as many, most of
which fall together), and numbers are changed by a part of themselves where one more or less would be too little to see.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import parso  # pyright: ignore[reportMissingImports]
from cosmic_ray.ast import Visitor, get_ast  # pyright: ignore[reportMissingImports]
from cosmic_ray.operators.number_replacer import NumberReplacer  # pyright: ignore[reportMissingImports]
from cosmic_ray.operators.operator import Operator  # pyright: ignore[reportMissingImports]
from cosmic_ray.operators.provider import OperatorProvider  # pyright: ignore[reportMissingImports]

LARGE, SMALL = 1e5, 1e-2
BINARY = {
    "Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "FloorDiv": "Mul", "Mod": "Mul", "Pow": "Mul",
    "BitOr": "BitAnd", "BitAnd": "BitOr", "BitXor": "BitAnd", "RShift": "LShift", "LShift": "RShift",
}  # fmt: skip
COMPARISONS = {
    "Eq": "NotEq", "NotEq": "Eq", "Is": "IsNot", "IsNot": "Is", "Lt": "LtE", "LtE": "Lt", "Gt": "GtE", "GtE": "Gt",
}  # fmt: skip
OPERATORS = (
    *(f"ReplaceBinaryOperator_{one}_{other}" for one, other in BINARY.items()),
    *(f"ReplaceComparisonOperator_{one}_{other}" for one, other in COMPARISONS.items()),
    "ReplaceUnaryOperator_Delete_USub",
    "ReplaceUnaryOperator_Delete_Not",
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "RemoveDecorator",
    "ZeroIterationForLoop",
)
SWAPPED_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}


class Number(NumberReplacer):
    """Whole numbers by one more and less; large and small ones, and fractions, by a half more and by half."""

    def mutate(self, node: Any, index: int) -> Any:
        value = ast.literal_eval(node.value)
        near = isinstance(value, int) and abs(value) < LARGE
        changed = value + (1, -1)[index] if near else value * (1.5, 0.5)[index] or (1.0, -1.0)[index]
        return parso.python.tree.Number(f" {changed}", node.start_pos)


class SwapName(Operator):
    """The least for the greatest, any for all, and back."""

    def mutation_positions(self, node: Any) -> Iterator[tuple]:
        if node.type == "name" and node.value in SWAPPED_NAMES:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = SWAPPED_NAMES[node.value]
        return node

    @classmethod
    def examples(cls) -> tuple:
        return ()


@dataclass(frozen=True)
class Mutant:
    """A changed module.

    Attributes:
        line: number of the changed line, from 1.
        before, after: that line, without its indentation.
        text: of the whole module.
    """

    line: int
    before: str
    after: str
    text: str

    def __str__(self) -> str:
        return f"{self.line}: {self.before}  ->  {self.after}"


class _Change(Visitor):
    """Applies an operator at its n-th place."""

    def __init__(self, operator: Operator, number: int) -> None:
        self._operator, self._left, self.position = operator, number, (0, 0)

    def visit(self, node: Any) -> Any:
        for index, (start, _) in enumerate(self._operator.mutation_positions(node)):
            if self._left == 0:
                self.position = start
                node = self._operator.mutate(node, index)
            self._left -= 1
        return node


def operators() -> list[Operator]:
    known: Any = OperatorProvider()
    return [*(known[name]() for name in OPERATORS), Number(), SwapName()]


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module's ``source``, in the order of its lines, each text once."""
    silent, found = _silent_lines(source), {}
    for operator in operators():
        for number in range(len(source)):  # an upper limit: there is none behind the last
            change = _Change(operator, number)
            text = change.walk(get_ast(source)).get_code()
            if change.position == (0, 0):
                break
            mutant = _mutant(source, text, change.position[0])
            # of a function's head only the star that sets names apart from values is ever changed
            if change.position not in silent and not mutant.before.startswith("def ") and _is_python(text):
                found[text] = mutant
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _mutant(source: str, text: str, line: int) -> Mutant:
    before, after = source.splitlines(), text.splitlines()
    changed = next((n for n, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), line - 1)
    return Mutant(changed + 1, before[changed].strip(), after[changed].strip(), text)


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


class _Silent:
    """Places that nothing can come of: annotations (never evaluated), and what is there for a type checker alone."""

    def __init__(self, ranges: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
        self._ranges = ranges

    def __contains__(self, position: object) -> bool:
        return any(start <= position < end for start, end in self._ranges)  # pyright: ignore[reportOperatorIssue]


def _silent_lines(source: str) -> _Silent:
    ranges = []
    for node in ast.walk(ast.parse(source)):
        annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            annotations.append(node)  # pyright: ignore[reportArgumentType]
        for each in filter(None, annotations):
            ranges.append(((each.lineno, each.col_offset), (each.end_lineno, each.end_col_offset)))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            ranges.append((token.start, token.end))
    return _Silent(ranges)
