"""How many parameters a function may have: more of them are a record that has no name yet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST = 8
PUBLIC = {
    "linear_logps/api.py: linear_logps",
    "linear_logps/vocab_parallel.py: linear_logps_vocab_parallel",
    "linear_dpo/api.py: linear_dpo_loss",
    "preference.py: preference_loss",
    "kto.py: linear_kto_loss",
}
"""Fixed signatures that users call, with options by keyword."""
LIGER = {"integrations/liger.py: FusedLinearDPOLoss.__init__"}
"""The signature of the class that it stands in for."""
TRANSFORMERS = {"model/attention/interface.py: packed_attention"}
"""The signature of transformers' ``AttentionInterface``."""


def _functions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, int]]:
    """Name and number of parameters of each, but for those that ``torch.library`` calls with a flat schema."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{inside}{node.name}."
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            decorators = " ".join(map(ast.unparse, getattr(node, "decorator_list", ())))
            arguments = node.args
            if "torch.library.custom_op" not in decorators and ".register_fake" not in decorators:
                yield (
                    name.removesuffix("."),
                    sum(map(len, (arguments.posonlyargs, arguments.args, arguments.kwonlyargs))),
                )
        yield from _functions(node, name)


def crowded(package: Path) -> set[str]:
    """Functions that have more, as "file: function"; not in kernels, whose arguments are what a launch takes."""
    found = set()
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if not name.startswith("kernels/"):
            functions = _functions(ast.parse(path.read_text()))
            found |= {f"{name}: {function}" for function, count in functions if count > MOST}
    return found


@pytest.mark.parametrize(("package", "fixed"), [("dpo_kernels", PUBLIC | LIGER), ("engine", TRANSFORMERS)])
def test_no_function_has_more_than_eight_parameters(package, fixed):
    assert crowded(ROOT / package) == fixed


@pytest.mark.parametrize(("parameters", "found"), [(8, set()), (9, {"linear_x/impl.py: Inner.forward"})])
def test_more_are_found(parameters, found, tmp_path):
    arguments = ", ".join(["self", *(f"x{i}" for i in range(parameters - 2)), "*", "last"])
    for folder in ("linear_x", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "impl.py").write_text(f"class Inner:\n    def forward({arguments}): ...\n")
    assert crowded(tmp_path) == found
