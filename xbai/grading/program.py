"""Which block of a response is the program that it gives as its answer."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Sequence

from xbai.grading.boxed import after_thinking
from xbai.grading.fences import Block, fenced_blocks
from xbai.grading.python_syntax import parse_python

_BUILTINS = frozenset(dir(builtins))
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def find_program(response: str, function: str | None = None) -> str | None:
    """The last block after the thinking that can be the program; None without one.

    It is Python that does something when it is run (calls anything outside of its functions) or, where a function is
    asked for, that defines it; not an example of the use of an earlier one. Blocks that are marked as another language
    count only where no other can be the program. A program that was cut off is not replaced by an earlier one. The
    function may be a method of `Solution`.
    """
    blocks = list(fenced_blocks(after_thinking(response)))
    if any(_is_cut_off(block) for block in blocks if not block.is_closed):
        return None
    closed = [block for block in blocks if block.is_closed]
    unmarked = [block for block in closed if block.may_be_python]
    return _last_program(unmarked, function) or _last_program(closed, function)


def _last_program(blocks: Sequence[Block], function: str | None) -> str | None:
    program, defined = None, set[str]()
    for block in blocks:
        tree = parse_python(block.text)
        if tree is None or not (_runs(tree) if function is None else function in _bound(tree)):
            continue
        if defined & _borrowed(tree):
            continue
        program = block.text
        defined |= {node.name for node in tree.body if isinstance(node, _DEFINITIONS)}
    return program


def _is_cut_off(block: Block) -> bool:
    """Whether a block without an end is a program that was cut off, rather than a fence too many."""
    if not block.may_be_python or not block.text.strip():
        return False
    return block.is_marked_python or _begins_like_python(block.text)


def _begins_like_python(text: str) -> bool:
    lines = (line.strip() for line in text.split("\n"))
    first = next((line for line in lines if line and not line.startswith("#")), "")
    tree = parse_python(first) or parse_python(f"{first} pass")
    return tree is not None and any(map(_acts, tree.body))


def _acts(statement: ast.stmt) -> bool:
    """Whether it is more than an expression, such as stands in an output; `Input: none` is an annotation."""
    if isinstance(statement, ast.AnnAssign):
        return statement.value is not None
    return not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Call)


def _runs(tree: ast.Module) -> bool:
    """Whether it calls anything that there is when it is run; `Point(1, 2)` may stand in an output."""
    known = _bound(tree) | _BUILTINS
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id not in known):
            return True
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return False


def _borrowed(tree: ast.Module) -> set[str]:
    """The names that it uses and does not make; none where it may have them from `import *`."""
    bound = _bound(tree)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return set() if "*" in bound else used - bound


def _bound(tree: ast.Module) -> set[str]:
    """The names that it makes, in whatever scope."""
    return {name for node in ast.walk(tree) for name in _names_made_by(node)}


def _names_made_by(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
            yield name
        case ast.alias(name=name, asname=alias):
            yield alias or name.partition(".")[0]
