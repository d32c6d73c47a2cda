"""Values of names in a Python script, read off its syntax tree. Nothing is run."""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow,
}  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32", "half", "float")
_CASTS = {"str": str, "int": int, "float": float, "list": list, "bool": bool, "Path": str}
_YES = ("is_bfloat16_supported", "is_bf16_supported", "is_torch_bf16_gpu_available")
"""Questions about the device that are answered with yes: on every GPU since 2020."""
_LARGEST = 2**63
_CHANGEABLE = (ast.List, ast.Dict, ast.Call, ast.Set, ast.ListComp, ast.DictComp)
_CHANGING = ("append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update")
"""Methods of lists and mappings after which they are not what was assigned."""


class UnknownValueError(Exception):
    """A value that only a run of the script would tell; ``line`` is where."""

    def __init__(self, text: str, line: int) -> None:
        super().__init__(text)
        self.line = line


@dataclass(frozen=True)
class _Assignment:
    scope: str
    line: int
    end: int
    """The last line of the statement, behind which the name has its value."""
    value: ast.expr | None
    """None where something else than an expression decides, such as a loop."""
    condition: int | None
    """The line of the condition or loop that it stands under."""


@dataclass(frozen=True)
class Attribute:
    """An assignment such as ``args.beta = 0.2``, or ``setattr(args, "beta", 0.2)``."""

    of: str
    """What stands before the last point."""
    name: str
    value: ast.expr
    line: int
    condition: int | None
    """The line of the condition or loop that it stands under."""


class Script:
    """The syntax tree of a script, with the assignments of every name."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self._assigned: dict[str, list[_Assignment]] = {}
        self._scopes: dict[ast.AST, str] = {}
        self.attributes: list[Attribute] = []
        self._changed: dict[str, int] = {}
        """Lines in which a list or a mapping is changed, by its name."""
        self._defaults = dict(_option_defaults(tree))
        self._walk(tree.body, "", None)

    def _walk(self, body: list[ast.stmt], scope: str, condition: int | None) -> None:
        for statement in body:
            for node in ast.walk(statement):
                self._scopes.setdefault(node, scope)
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inside = f"{scope}.{statement.name}"
                for node in ast.walk(statement):
                    self._scopes[node] = inside
                for argument in getattr(statement, "args", ast.arguments([], [], None, [], [], None, [])).args:
                    self._note(argument.arg, _Assignment(inside, statement.lineno, statement.lineno, None, None))
                self._walk(statement.body, inside, None)
                continue
            self._assign(statement, scope, condition)
            inner = condition if condition is not None or _always(statement) else statement.lineno
            for block in ("body", "orelse", "finalbody"):
                self._walk(getattr(statement, block, []), scope, inner)

    def _assign(self, statement: ast.stmt, scope: str, condition: int | None) -> None:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                self._bind(target, statement.value, scope, condition)
        elif isinstance(statement, ast.AugAssign | ast.For):
            self._bind(statement.target, None, scope, condition)
        elif isinstance(statement, ast.Expr) and isinstance(call := statement.value, ast.Call):
            self._call(call, condition)

    def _call(self, call: ast.Call, condition: int | None) -> None:
        """What a call that stands alone changes."""
        function = call.func
        if called(call) == "setattr" and len(call.args) == 3 and isinstance(call.args[1], ast.Constant):
            of, name, value = ast.unparse(call.args[0]), str(call.args[1].value), call.args[2]
            self.attributes.append(Attribute(of, name, value, call.lineno, condition))
        elif (
            isinstance(function, ast.Attribute) and function.attr in _CHANGING and isinstance(function.value, ast.Name)
        ):
            self._changed.setdefault(function.value.id, call.lineno)

    def _bind(self, target: ast.expr, value: ast.expr | None, scope: str, condition: int | None) -> None:
        if isinstance(target, ast.Name):
            end = target.lineno if value is None else value.end_lineno or value.lineno
            self._note(target.id, _Assignment(scope, target.lineno, end, value, condition))
        elif isinstance(target, ast.Tuple | ast.List):
            matched = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
            for place, one in enumerate(target.elts):
                # the first of a tuple that a call gives, such as model, tokenizer = load(...)
                part = value.elts[place] if matched else value if place == 0 else None  # type: ignore[union-attr]
                self._bind(one, part, scope, condition)
        elif isinstance(target, ast.Attribute) and value is not None:
            found = Attribute(ast.unparse(target.value), target.attr, value, target.lineno, condition)
            self.attributes.append(found)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            self._changed.setdefault(target.value.id, target.lineno)

    def _note(self, name: str, assignment: _Assignment) -> None:
        self._assigned.setdefault(name, []).append(assignment)

    def calls(self, *names: str) -> list[ast.Call]:
        """The calls of functions of these names, in order."""
        found = [n for n in ast.walk(self.tree) if isinstance(n, ast.Call) and called(n) in names]
        return sorted(found, key=lambda call: (call.lineno, call.col_offset))

    def node(self, node: ast.expr) -> ast.expr:
        """The expression that a name stands for, followed from name to name.

        Raises:
            UnknownValueError: it depends on what the script does.
        """
        seen: set[ast.expr] = set()
        while isinstance(node, ast.Name) and node not in seen:
            seen.add(node)
            node = self._last(node)
        return node

    def _last(self, name: ast.Name) -> ast.expr:
        scope = self._scopes.get(name, "")
        every = self._assigned.get(name.id, [])
        inside = [a for a in every if a.scope == scope and a.end < name.lineno] if scope else []
        before = [a for a in every if a.scope == "" and (scope or a.end < name.lineno)]
        for found in (inside, before):
            if not found:
                continue
            last = found[-1]
            if last.condition is not None:
                raise UnknownValueError(
                    f"{name.id} is set in line {last.line}, under the condition of line {last.condition}", name.lineno
                )
            if (line := self._changed.get(name.id)) and isinstance(last.value, _CHANGEABLE):
                raise UnknownValueError(f"{name.id} is changed in line {line}", name.lineno)
            if last.value is not None:
                return last.value
            raise UnknownValueError(f"{name.id} is not a constant", name.lineno)
        raise UnknownValueError(f"{name.id} is not set in the script", name.lineno)

    def value(self, node: ast.expr) -> Any:
        """The value of an expression of constants.

        Raises:
            UnknownValueError: it depends on what the script does.
        """
        node = self.node(node)
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Dict):
            return self._mapping(node)
        if isinstance(node, ast.JoinedStr):
            return "".join(str(self.value(p.value if isinstance(p, ast.FormattedValue) else p)) for p in node.values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            inner = self.value(node.operand)
            return -inner if isinstance(node.op, ast.USub) else not inner
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self._computed(node)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Call):
            return self._called(node)
        raise unknown(node)

    def _mapping(self, node: ast.Dict) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            found |= self.value(value) if key is None else {str(self.value(key)): self.value(value)}
        return found

    def _computed(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        numbers = all(isinstance(side, int | float) and abs(side) < _LARGEST for side in (left, right))
        texts = isinstance(node.op, ast.Add | ast.Div) and all(isinstance(side, str) for side in (left, right))
        if texts:
            return left + right if isinstance(node.op, ast.Add) else os.path.join(left, right)
        if not numbers or (isinstance(node.op, ast.Pow) and abs(right) > 64):
            raise unknown(node)
        try:
            return _OPERATORS[type(node.op)](left, right)
        except ArithmeticError:
            raise unknown(node) from None

    def _attribute(self, node: ast.Attribute) -> Any:
        if isinstance(node.value, ast.Name):
            if node.value.id == "torch" and node.attr in _DTYPES:
                return {"half": "float16", "float": "float32"}.get(node.attr, node.attr)
            if node.value.id not in self._assigned or node.attr not in self._defaults:
                raise unknown(node)
            default, line = self._defaults[node.attr]
            raise UnknownValueError(
                f"{ast.unparse(node)} comes from the command line (its default in line {line} is "
                f"{ast.unparse(default)})", node.lineno,
            )  # fmt: skip
        raise unknown(node)

    def _called(self, node: ast.Call) -> Any:
        name, values = called(node), node.args
        if name in _YES and not values:
            return True
        if name == "dict" and not values:
            return {word.arg: self.value(word.value) for word in node.keywords if word.arg}
        if ast.unparse(node.func) == "os.path.join":
            return os.path.join(*(str(self.value(part)) for part in values))
        if name in _CASTS and len(values) == 1 and not node.keywords:
            return _CASTS[name](self.value(values[0]))
        raise unknown(node)

    def keywords(self, call: ast.Call, positional: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.expr]]:
        """The arguments of a call by name, those of ``**mapping`` among them."""
        yield from zip(positional, call.args, strict=False)
        for word in call.keywords:
            if word.arg is not None:
                yield word.arg, word.value
                continue
            yield from self.items(word.value)

    def items(self, node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
        """The items of a mapping, written as ``{...}`` or ``dict(...)``."""
        mapping = self.node(node)
        if isinstance(mapping, ast.Call) and called(mapping) == "dict" and not mapping.args:
            yield from self.keywords(mapping)
        elif isinstance(mapping, ast.Dict):
            for key, value in zip(mapping.keys, mapping.values, strict=True):
                yield from self.items(value) if key is None else [(str(self.value(key)), value)]
        else:
            raise unknown(mapping)


def called(call: ast.expr) -> str:
    """The last part of the name of the function that is called."""
    function = call.func if isinstance(call, ast.Call) else call
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def unknown(node: ast.expr) -> UnknownValueError:
    """That an expression is no constant."""
    text = ast.unparse(node)
    return UnknownValueError(f"{text[:57] + '...' if len(text) > 60 else text} is not a constant", node.lineno)


def _always(statement: ast.stmt) -> bool:
    """Whether what stands inside always runs, once."""
    main = isinstance(statement, ast.If) and ast.unparse(statement.test).startswith("__name__ ==")
    return main or isinstance(statement, ast.With | ast.Try | ast.AsyncWith)


def _option_defaults(tree: ast.Module) -> Iterator[tuple[str, tuple[ast.expr, int]]]:
    """Defaults of the options of ``argparse`` and of dataclasses that a parser fills."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) == "add_argument" and node.args:
            flag = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            for word in node.keywords:
                if word.arg == "default":
                    yield str(flag).lstrip("-").replace("-", "_"), (word.value, node.lineno)
        elif isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
                    words = line.value.keywords if isinstance(line.value, ast.Call) else []
                    given = [word.value for word in words if word.arg == "default"]
                    yield line.target.id, (given[0] if given else line.value, line.lineno)
