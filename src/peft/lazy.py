"""Names that are imported when they are first asked for, and a word about those that do not exist yet."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .errors import nearest

Hooks = tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]


def names(module: str, *tables: Mapping[str, str]) -> Hooks:
    """`__getattr__`, `__dir__` and `__all__` of a module whose names live elsewhere.

    Arguments:
        module: the full name of the module that gets them.
        tables: "module" or "module:original_name" -> the names, separated by blanks.
    """
    places = {name: place for table in tables for place, several in table.items() for name in several.split()}
    announce(module)

    def __getattr__(name: str) -> Any:
        if name not in places and not name.startswith("_") and _is_module(f"{module}.{name}"):
            return whole(f"{module}.{name}")
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}.{_reason(name, places)}")
        place, _, original = places[name].partition(":")
        value = getattr(whole(place), original or name)
        setattr(sys.modules[module], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module]), *places})

    return __getattr__, __dir__, sorted(places)


def whole(module: str) -> ModuleType:
    """Import a module, and before it the packages it lies in, each to its end.

    A thread that is in the package, and asks for a file of it, and one that is in the file, and asks for the package,
    would wait for each other; Python gives one of them an error then.
    """
    for package in re.finditer(r"\.", module):
        import_module(module[: package.start()])
    return import_module(module)


def _is_module(fullname: str) -> bool:
    try:
        return find_spec(fullname) is not None
    except ImportError:  # of a later release
        return False


def announce(module: str) -> None:
    """Let `from module import name` say why a name is not there.

    Python asks the finders, `Later` among them, about a missing name only if the module looks like a package.
    """
    vars(sys.modules[module]).setdefault("__path__", [])


def _reason(name: str, exist: Mapping[str, str]) -> str:
    """Why a name is not there."""
    from .later import NAMES

    return " It comes with a later release." if name in NAMES else nearest(name, exist)


def _alike(name: str, exist: Sequence[str]) -> list[str]:
    """The names of the same kind (Config, Model, ...), or all of them if there are none."""
    kind = re.findall(r"[A-Z]?[a-z]+$|$", name)[0]
    return [e for e in exist if kind and e.endswith(kind)] or list(exist)


class Later(MetaPathFinder):
    """The last finder: it finds nothing, but says of a name or module that it comes later, or what was meant.

    `from peft import Name` asks the finders for `peft.Name` when the package has no such attribute. A plain
    `hasattr(peft, "Name")` stays False.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise ImportError for what is known to come later; None for all else."""
        if not fullname.startswith("peft."):
            return None
        from .later import INTERNAL, NAMES, is_later_module

        parent, _, name = fullname.rpartition(".")
        if name in INTERNAL and parent != "peft":
            raise ImportError(f"{fullname} is internal to the original library and has no counterpart here.", name=name)
        if name not in NAMES and not is_later_module(fullname):
            return None
        exist = _alike(name, getattr(sys.modules.get(parent), "__all__", []))
        have = f" {parent} has {', '.join(exist)}." if exist else ""
        raise ImportError(f"{fullname} comes with a later release of this library.{have}", name=fullname)


class Deep(MetaPathFinder, Loader):
    """Finds `peft.tuners.NAME`, and its `config`, `layer` and `model`, where `peft.methods.NAME` is the one file; and
    `peft.tuners.NAME.PART` where the method is a folder with that file.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of a module that shows the names of the method's file; None for all else."""
        place = _place(fullname)
        return None if place is None else ModuleSpec(fullname, self, is_package=fullname.count(".") == 2)

    def exec_module(self, module: ModuleType) -> None:
        """Show every name of the method's file."""
        place = _place(module.__name__)
        assert place is not None
        own = vars(whole(place))
        module.__doc__ = own["__doc__"]
        shown = " ".join(name for name in own if not name.startswith("_"))
        module.__getattr__, module.__dir__, module.__all__ = names(module.__name__, {place: shown})  # type: ignore


def _place(fullname: str) -> str | None:
    """The file of a method that a path below `peft.tuners` means."""
    found = re.fullmatch(r"peft\.tuners\.(\w+)(?:\.(\w+))?", fullname)
    method = f"peft.methods.{found[1]}" if found else ""
    spec = find_spec(method) if found else None
    if found is None or spec is None:
        return None
    if found[2] and spec.submodule_search_locations is not None and find_spec(f"{method}.{found[2]}"):
        return f"{method}.{found[2]}"
    if found[2] == "bnb":  # of the methods that have layers of their own for its weights
        return method if hasattr(whole(method), "Linear4bit") else None
    return method if found[2] in (None, "config", "layer", "model", "router") else None


def install() -> None:
    """Put the finders behind all others, once."""
    if not any(isinstance(finder, Deep) for finder in sys.meta_path):
        sys.meta_path.append(Deep())
    if not any(isinstance(finder, Later) for finder in sys.meta_path):
        sys.meta_path.append(Later())
