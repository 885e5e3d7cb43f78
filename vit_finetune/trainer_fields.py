"""The fields of the installed `transformers.TrainingArguments`, read from its source text.

Importing the class takes seconds and loads torch, which a mistyped recipe key should not have to wait for.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


def read_trainer_fields() -> dict[str, tuple[Any, Any]]:
    """Type and default of each field by its name; enumerations are a Literal of their words.

    Raises:
        ImportError: transformers is not installed.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("transformers is not installed; run `pip install vit-finetune` again")
    folder = Path(spec.submodule_search_locations[0])
    arguments = ast.parse((folder / "training_args.py").read_text(encoding="utf-8"))
    choices = _enumerations([arguments, ast.parse((folder / "trainer_utils.py").read_text(encoding="utf-8"))])
    (definition,) = (
        node for node in arguments.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    return {
        node.target.id: (_annotation(node.annotation, choices), _default(node.value))
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _enumerations(modules: Iterable[ast.Module]) -> dict[str, Any]:
    """Types by name for the enumerations that TrainingArguments uses: a Literal of their values."""
    found: dict[str, Any] = {}
    for node in (node for module in modules for node in module.body if isinstance(node, ast.ClassDef)):
        if any(isinstance(base, ast.Name) and base.id == "ExplicitEnum" for base in node.bases):
            values = [
                item.value.value
                for item in node.body
                if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
            ]
            # YAML reads a bare `no` as false.
            found[node.name] = Annotated[
                Literal[tuple(values)], BeforeValidator(lambda value: "no" if value is False else value)
            ]
    return found


def _annotation(node: ast.expr, choices: dict[str, Any]) -> Any:
    """The type that an annotation's source names; what only Python can say becomes str."""
    match node:
        case ast.BinOp(left=ast.Name(id=name), right=ast.Name(id="str")) if name in choices:
            return choices[name]
        case ast.BinOp(left=left, right=right):
            return _annotation(left, choices) | _annotation(right, choices)
        case ast.Subscript(value=ast.Name(id="list")):
            return list[str]
        case ast.Subscript(value=ast.Name(id="dict")):
            return dict[str, Any]
        case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Constant(value=value)):
            return Literal[value]
        case ast.Constant(value=None):
            return type(None)
        case ast.Name(id=name):
            return {"bool": bool, "int": int, "float": float, "dict": dict[str, Any]}.get(name, str)
    return str


def _default(node: ast.expr | None) -> Any:
    """The default inside `field(default=…)` or `field(default_factory=list)`; None where it is computed."""
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            match keyword:
                case ast.keyword(arg="default", value=value):
                    try:
                        return ast.literal_eval(value)
                    except ValueError:
                        return None
                case ast.keyword(arg="default_factory", value=ast.Name(id="list")):
                    return []
    return None
