"""The tensors of a home by adapter name, each also in a cell, by which it is found without its name.

Compiled code guards what it looks up, and would be compiled again for an adapter of another name. It therefore reads
`cell.tensor`. Whoever puts another tensor into the home (`torch.func.functional_call`, FSDP2, a state that is assigned,
a move to another device) puts it into the cell by that, also while a graph is traced.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Cell:
    """Holds the tensor that one name stands for."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Cells(dict[str, Any]):
    """The parameters or the buffers of a home."""

    cells: dict[str, Cell] = {}  # noqa: RUF012 of those that have none yet, as while they are unpickled; never written

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        cell = self.cells.get(name)
        if cell is not None:
            cell.tensor = value

    def cell(self, name: str) -> Cell:
        """That of a name."""
        mine = self.__dict__.setdefault("cells", {})
        found: Cell | None = mine.get(name)
        if found is None:
            found = mine[name] = Cell(self[name])
        found.tensor = self[name]
        return found


def celled(home: M) -> M:
    """A home, whose tensors are found without their names from now on."""
    for table in ("_parameters", "_buffers"):
        home.__dict__[table] = Cells(home.__dict__[table])
    return home


def reference(home: nn.Module, name: str) -> Any:
    """What a home holds under a name: a module, or the cell of a tensor."""
    child = home._modules.get(name)
    if child is not None:
        return child
    for table in (home._parameters, home._buffers):
        if name in table:
            return table.cell(name) if type(table) is Cells else Cell(table[name])  # type: ignore[arg-type]
    return Cell(getattr(home, name))  # FSDP1 keeps views as plain attributes


def references(layer: nn.Module, name: str) -> dict[str, Any]:
    """`reference` of each home of a layer that holds something of the adapter `name`, by the home's own name."""
    homes = ((key, home) for key, home in layer._modules.items() if key != "base_layer")
    return {key: reference(home, name) for key, home in homes if name in home}  # type: ignore[operator, arg-type]
