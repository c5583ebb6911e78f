"""Jinja for templates of strangers: its sandbox, with a bound on the work that a template makes.

Work is counted in bytes, about: every operator, call, filter, loop and piece of text costs the size of what it reads
and of what it may make, and every node of the template 16 bytes each time it runs. It is counted before it is done, so
the bound holds for time and memory; since no clock is read, a template either always passes or never.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from functools import wraps
from itertools import chain
from types import MethodType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["BoundedEnvironment", "WorkError", "size_of"]

NODE = 16  # bytes of a reference, and what one node of a template costs
MAX_TEMPLATE = 1 << 18  # characters; the longest published ones have some 30,000
MAX_NUMBER = 100_000  # as an argument, where it may be a width or a count
MAX_BITS, MAX_DEPTH = 4096, 1000

CHEAP = {"count", "d", "default", "first", "last", "length", "safe"}  # whatever the size of what they are given
GROWING = {"center", "format", "indent", "join", "replace", "tojson"}
# Of no published chat template; quadratic, or slow in other ways.
LEFT_OUT = ["pprint", "striptags", "urlize", "wordwrap", "xmlattr"]
COMPARISONS = {"==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ne", "lt", "lessthan", "le", "gt", "greaterthan"}
READING_TESTS = COMPARISONS | {"ge", "in", "lower", "upper"}
# A width of three digits or more, one that is an argument, or a field within a field.
WIDE = re.compile(r"\d{3}|%[^a-zA-Z%]*\*|\{[^{}]*\{")


class WorkError(Exception):
    """A template loops or grows beyond its bound."""

    def __init__(self) -> None:
        super().__init__(
            "its template loops, or its text grows, far beyond what such a conversation needs: "
            "give a text instead of messages, or another chat_template"
        )


def size_of(value: Any, most: int) -> int:
    """Bytes of a value and of all that it refers to, about; what is referred to twice counts twice.

    Stops counting beyond ``most``.
    """
    size, todo = 0, [iter([value])]
    while todo and size <= most:
        for item in todo[-1]:
            size += NODE + (len(item) if isinstance(item, (str, bytes, range)) else 0)
            if (children := _children(item)) is not None:
                todo.append(children)
                if len(todo) > MAX_DEPTH:
                    raise WorkError
                break
        else:
            todo.pop()
    return size


def _children(value: Any) -> Iterator[Any] | None:
    if isinstance(value, Namespace):
        value = value._Namespace__attrs  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return chain.from_iterable(value.items())
    if isinstance(value, Iterable) and isinstance(value, Sized) and not isinstance(value, (str, bytes, range)):
        return iter(value)
    return None


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment that Transformers gives a chat template, for one rendering of at most ``work`` bytes.

    WorkError is raised where a template needs more. Left out are ``lipsum`` and the filters LEFT_OUT.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, work: int) -> None:
        extensions = [loopcontrols, _Generation]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions, finalize=self.read
        )
        self._left = work
        del self.globals["lipsum"]
        self.globals |= {"namespace": _namespace, "raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters["tojson"] = self._tojson
        self.filters = {
            name: self._bounded_filter(name, function)
            for name, function in self.filters.items()
            if name not in LEFT_OUT
        }
        self.tests |= {name: self._bounded_test(self.tests[name]) for name in READING_TESTS}

    def spend(self, work: int) -> bool:
        """Count work, before it is done. True, for conditions."""
        self._left -= work
        if self._left < 0:
            raise WorkError
        return True

    def read(self, value: Any) -> Any:
        """The value, counted as read."""
        self.spend(size_of(value, self._left))
        return value

    def items_of(self, value: Any) -> Any:
        """What a loop runs over, counted; an iterator becomes a list."""
        return self.read(list(value) if isinstance(value, Iterator) else value)

    def join_text(self, *values: Any) -> str:
        """The operator ``~``."""
        return "".join([str(self.read(value)) for value in values])

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """What a template, a macro or a block has written, joined."""
        pieces = list(pieces)
        self.spend(sum(map(len, pieces)))
        return "".join(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            self._grow(left, [right])
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(sequence, (int, float)):
                    self.spend(size_of(sequence, self._left) * max(times, 1))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int):
            _check_bits(result.bit_length())
        return self.read(result)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if isinstance(__obj, MethodType) and __obj.__self__ is __self:  # what _Counter has put in
            return __obj(*args)
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            if __obj.__name__ in ("encode", "decode") and not {*args, *kwargs.values()} <= {"utf-8"}:
                raise SecurityError("texts are encoded in UTF-8 alone")  # other codecs take the square of their length
            if __obj.__name__ in ("format", "format_map"):
                _check_format(str(owner))
            args, kwargs = __self._arguments(args, kwargs)
            __self._grow(owner, [*args, *kwargs.values()])
        elif not isinstance(__obj, Macro):
            __self.read(owner if isinstance(owner, (list, tuple)) else None)
            args, kwargs = __self._arguments(args, kwargs)
        return __self.read(super().call(__context, __obj, *args, **kwargs))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        counted = _Counter().visit(source)
        counted.set_environment(self)
        return super()._generate(counted, *args, **kwargs)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        counted = tuple(self.items_of(value) for value in args)
        return counted, {name: self.items_of(value) for name, value in kwargs.items()}

    def _grow(self, subject: Any, arguments: list[Any]) -> None:
        """Count what a function makes at most of something that it repeats, fills or replaces with its arguments."""
        most = 0
        for value in arguments:
            if isinstance(value, int) and value > MAX_NUMBER:
                raise WorkError
            text = isinstance(value, (str, bytes))
            most = max(most, value if isinstance(value, int) else len(value) if text else size_of(value, self._left))
        self.spend(size_of(subject, self._left) * (1 + most))

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if name in CHEAP:
                return function(*args, **kwargs)
            given, kwargs = self._arguments(args[skipped:], kwargs)
            numbers = [value for value in (*given[1:], *kwargs.values()) if isinstance(value, int)]
            self._grow(given[0], [*given[1:], *kwargs.values()] if name in GROWING else numbers)
            if name == "sum" and not isinstance(kwargs.get("start", (*given, 0, 0)[2]), (int, float)):
                raise TypeError("sum adds numbers only")
            if name == "format":
                _check_format(given[0])
            return self.read(function(*args[:skipped], *given, **kwargs))

        return bounded

    def _bounded_test(self, function: Any) -> Callable[..., Any]:
        @wraps(function)
        def bounded(*args: Any) -> Any:
            return function(*map(self.items_of, args))

        return bounded

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as it is; Jinja's own filter escapes HTML."""
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.concat(map(self.read, encoder.iterencode(value)))


class _Counter(NodeTransformer):
    """Has what a template does between its calls counted: loops, comparisons, lists, joined and cut text."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.test is not None:
            node.test = nodes.And(_spend(node.test), node.test, lineno=node.lineno)
        node.iter = _call("items_of", node.iter)
        return self._counted_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._counted_body(node)

    visit_CallBlock = visit_Block = visit_Macro  # noqa: N815

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _call("read", node.expr)
        for operand in node.ops:
            operand.expr = _call("read", operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("join_text", *node.nodes)

    def visit_List(self, node: nodes.Expr) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _call("read", node)

    visit_Tuple = visit_Dict = visit_List  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("read", node) if isinstance(node.arg, nodes.Slice) else node

    def _counted_body(self, node: Any) -> nodes.Node:
        """The nodes are counted each time that the body runs."""
        spend = nodes.ExprStmt(_spend(node), lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, spend)
        return node


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant has said, for training; its text is what stands in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _call(name: str, *arguments: Any) -> nodes.Call:
    line = arguments[0].lineno
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), list(arguments), [], None, None, lineno=line)


def _spend(node: nodes.Node) -> nodes.Call:
    """What running a node costs, without that of its calls."""
    size = NODE * (1 + sum(1 for _ in node.find_all(nodes.Node)))
    return _call("spend", nodes.Const(size, lineno=node.lineno))


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise WorkError


def _check_format(text: str) -> None:
    if WIDE.search(text):
        raise WorkError


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    if hidden := [name for name in dict(*args, **kwargs) if str(name).startswith("_")]:
        raise SecurityError(f"a namespace cannot hold {str(hidden[0])[:80]!r}")
    return Namespace(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    _check_format(form)
    return datetime.now().strftime(form)
