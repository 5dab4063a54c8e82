"""Pickles of functions that a fresh process cannot import: lambdas, nested functions, functions of a notebook.

Such a function travels by value: its code, its defaults, what it closes over, and those globals that it names.
Everything else travels as in any pickle, functions and classes of modules by their names.
"""

import dis
import importlib
import io
import marshal
import os
import pickle
import sys
import types
from typing import Any


def dumps(value: Any) -> bytes:
    """Pickle for ``pickle.loads`` in a process of the same interpreter.

    Raises:
        TypeError: names what cannot travel, and why.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise TypeError(f"cannot be sent to another process: {error}") from error
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return importlib.import_module, (value.__name__,)
        if isinstance(value, types.FunctionType) and not _importable(value):
            return _reduce_function(value)
        if isinstance(value, type) and value.__module__ == "__main__" and not _importable(value):
            raise pickle.PicklingError(
                f"class {value.__qualname__} exists in this interpreter alone; put it into a module file and import it"
            )
        return NotImplemented


def main_is_a_file() -> bool:
    """Whether a fresh process can import what ``__main__`` is here: a script, but no notebook and nothing typed in."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return path is not None and os.path.isfile(path)


def _importable(value: Any) -> bool:
    """Whether a fresh process finds it by module and name."""
    module = sys.modules.get(value.__module__ or "")
    if module is None or (value.__module__ == "__main__" and not main_is_a_file()):
        return False
    found = module
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _reduce_function(function: types.FunctionType) -> tuple:
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append((cell.cell_contents,))
        except ValueError:  # assigned only later
            contents.append(())
    state = {
        "globals": {n: function.__globals__[n] for n in _global_names(function.__code__) if n in function.__globals__},
        "defaults": function.__defaults__,
        "keyword_defaults": function.__kwdefaults__,
        "contents": contents,
        "attributes": function.__dict__,
    }
    blank = (marshal.dumps(function.__code__), function.__name__, function.__qualname__, len(contents))
    # The state comes after the function itself, so that a function may refer to itself.
    return _blank_function, blank, state, None, None, _fill_function


def _global_names(code: types.CodeType) -> set[str]:
    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _blank_function(code: bytes, name: str, qualified_name: str, num_cells: int) -> types.FunctionType:
    cells = tuple(types.CellType() for _ in range(num_cells))
    function = types.FunctionType(marshal.loads(code), {"__name__": "__main__"}, name, None, cells)
    function.__qualname__ = qualified_name
    return function


def _fill_function(function: types.FunctionType, state: dict[str, Any]) -> None:
    function.__globals__.update(state["globals"])
    function.__defaults__ = state["defaults"]
    function.__kwdefaults__ = state["keyword_defaults"]
    function.__dict__.update(state["attributes"])
    for cell, content in zip(function.__closure__ or (), state["contents"], strict=True):
        if content:
            cell.cell_contents = content[0]
