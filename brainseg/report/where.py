"""Where: the words of `--where` become a choice of rows, such as `site = 'A' and fold in (0, 1) and dice < 0.5`.

A grammar of our own, a page long, rather than a database: `or`, `and`, `not`, brackets, `= != < <= > >=`, `in (...)`,
`is null`, `is not null`; names bare or in "double quotes", texts in 'single quotes'. As in SQL, a comparison with null is
neither true nor false. Nothing here is ever executed: words become nodes, nodes call pyarrow kernels.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from brainseg.errors import UsageError

Column = Any
"""A pyarrow Array or ChunkedArray, which carry no types of their own."""

Look = Callable[[str], Column]
MOST_WORDS, DEEPEST = 2000, 40
_WORD = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])|(?P<text>'(?:[^']|'')*')|(?P<quoted>"[^"]+")"""
    r"""|(?P<op><=|>=|<>|!=|=|<|>)|(?P<mark>[(),])|(?P<name>[A-Za-z_][\w.]*))"""
)
_COMPARE = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_JOINED = {"and": pc.and_kleene, "or": pc.or_kleene}
_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
Literal = str | float | bool


@dataclass(frozen=True)
class Filter:
    """A condition that has been read: its text, the columns it names, and how it judges rows."""

    text: str
    names: frozenset[str]
    _judge: Callable[[Look], Column]

    def mask(self, look: Look) -> Column:
        """True for each row that the condition holds for; `look` gives a column by its name."""
        return pc.fill_null(self._judge(look), False)


def parse(text: str) -> Filter:
    """Read a condition. UsageError says where it stops making sense."""
    reader = _Reader(text)
    judge = reader.either()
    if reader.kind:
        raise reader.lost("the end")
    return Filter(" ".join(text.split()), frozenset(reader.names), judge)


class _Reader:
    """Words from left to right; each method reads what its name says and returns how to judge it."""

    def __init__(self, text: str) -> None:
        self._text, self._words, self._next, self._depth = text, _words(text), 0, 0
        self.names: set[str] = set()

    @property
    def kind(self) -> str:
        """Of the next word: number, text, name, op, mark; empty at the end."""
        return self._words[self._next][0] if self._next < len(self._words) else ""

    def lost(self, expected: str) -> UsageError:
        found = f"'{self._words[self._next][1]}'" if self.kind else "the end"
        return UsageError(f"--where: found {found}, expected {expected}, in: {self._text}")

    def _take(self) -> str:
        self._next += 1
        return self._words[self._next - 1][1]

    def _ahead(self, word: str) -> bool:
        """Take the next word if it is this one: a mark, or a word of the grammar in any case."""
        here = self.kind in ("mark", "name") and self._words[self._next][1].lower() == word
        self._next += here
        return here

    def _need(self, word: str) -> None:
        if not self._ahead(word):
            raise self.lost(f"'{word}'")

    def either(self) -> Callable[[Look], Column]:
        return self._chain("or", lambda: self._chain("and", self._one))

    def _chain(self, word: str, part: Callable[[], Callable[[Look], Column]]) -> Callable[[Look], Column]:
        parts = [part()]
        while self._ahead(word):
            parts.append(part())
        return parts[0] if len(parts) == 1 else lambda look: _joined(word, [p(look) for p in parts])

    def _one(self) -> Callable[[Look], Column]:
        self._depth += 1
        if self._depth > DEEPEST:
            raise UsageError(f"--where: more than {DEEPEST} brackets or `not` inside one another")
        if self._ahead("not"):
            inner = self._one()
            judge: Callable[[Look], Column] = lambda look: pc.invert(inner(look))  # noqa: E731  it is returned, not kept
        elif self._ahead("("):
            judge = self.either()
            self._need(")")
        else:
            judge = self._comparison()
        self._depth -= 1
        return judge

    def _comparison(self) -> Callable[[Look], Column]:
        if self.kind not in ("name", "quoted"):
            raise self.lost("a column")
        name = self._take()
        self.names.add(name)
        if self._ahead("is"):
            wanted = self._ahead("not")
            self._need("null")
            return lambda look: pc.is_valid(look(name)) if wanted else pc.is_null(look(name))
        negated = self._ahead("not")
        if self._ahead("in"):
            values = self._listed()
            return lambda look: _inside(name, look(name), values, negated=negated)
        if negated or self.kind != "op":
            raise self.lost("'in'" if negated else "one of = != < <= > >= in is")
        sign, value = self._take(), self._literal()
        return lambda look: _compared(sign, name, look(name), value)

    def _listed(self) -> list[Literal]:
        self._need("(")
        values = [self._literal()]
        while self._ahead(","):
            values.append(self._literal())
        self._need(")")
        return values

    def _literal(self) -> Literal:
        for word, value in (("true", True), ("false", False)):
            if self._ahead(word):
                return value
        if self.kind == "number":
            return float(self._take())
        if self.kind == "text":
            return self._take()
        raise self.lost("a number or a 'text' in single quotes")


def _words(text: str) -> list[tuple[str, str]]:
    """Kind and value of each word; quotes are taken off."""
    found: list[tuple[str, str]] = []
    place, end = 0, len(text.rstrip())
    while place < end:
        match = _WORD.match(text, place)
        if match is None or len(found) == MOST_WORDS:
            raise UsageError(f"--where: cannot read it from here on: {text[place : place + 40].strip()}")
        kind, word = str(match.lastgroup), match[str(match.lastgroup)]
        found.append((kind, word[1:-1].replace("''", "'") if kind == "text" else word.strip('"')))
        place = match.end()
    return found


def _inside(name: str, column: Column, values: Sequence[Literal], *, negated: bool) -> Column:
    found = _joined("or", [_compared("=", name, column, value) for value in values])
    return pc.invert(found) if negated else found


def _joined(word: str, masks: Sequence[Column]) -> Column:
    first, *rest = masks
    for mask in rest:
        first = _JOINED[word](first, mask)
    return first


def _compared(sign: str, name: str, column: Column, value: Literal) -> Column:
    """Compare a column with a literal, both in the column's kind; a text column that holds numbers compares as numbers."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if isinstance(value, str):
            return _COMPARE[sign](column, value)
        if isinstance(value, float):
            return _COMPARE[sign](_as_numbers(column), value)
    elif pa.types.is_boolean(kind) and isinstance(value, bool) and sign in ("=", "!=", "<>"):
        return _COMPARE[sign](column, value)
    elif (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and isinstance(value, float):
        return _COMPARE[sign](column.cast(pa.float64()), value)
    elif pa.types.is_timestamp(kind) and isinstance(value, str):
        try:
            return _COMPARE[sign](column, pa.scalar(value).cast(pa.timestamp("us", tz="UTC")))
        except pa.ArrowInvalid:
            pass
    raise UsageError(f"--where: {name} is of type {kind}, which cannot be {sign} {value!r}")


def _as_numbers(column: Column) -> Column:
    """A text column as numbers, null where it holds none."""
    return pc.if_else(pc.match_substring_regex(column, _NUMBER), pc.utf8_trim_whitespace(column), None).cast(pa.float64())


def unknown(name: str, known: Sequence[str]) -> UsageError:
    """The error for a column that does not exist, with those that do."""
    return UsageError(f"--where: there is no column '{name}'; there are {', '.join(known)}")


def scalar_columns(table: pa.Table) -> dict[str, Any]:
    """The columns of a table that a condition can name: those that hold one value a row."""
    return {f.name: table[f.name] for f in table.schema if not pa.types.is_nested(f.type)}
