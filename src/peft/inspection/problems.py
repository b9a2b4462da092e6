"""What is wrong with an adapter, as far as its own files tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..core.pattern import Selector, settings
from ..errors import listing, nearest
from .report import Inspection, Problem

Groups = Mapping[str, Mapping[str, Tensor]]
SHARED = "base_model"  # what all layers share stands there
FURTHER = ("target_parameters", "ensure_weight_tying", "token_indices")  # fields by which more is adapted
SHORTHANDS = ("all-linear", "dummy-target-modules")
PAIRS = {  # tensors that need each other
    "lora_A.weight": "lora_B.weight",
    "lora_embedding_A": "lora_embedding_B",
    "hada_w1_a": "hada_w1_b",
    "hada_w2_a": "hada_w2_b",
    "hada_t1": "hada_t2",
    "lokr_w1_a": "lokr_w1_b",
    "lokr_w2_a": "lokr_w2_b",
}


def problems_of(config: Any, groups: Groups, found: Inspection, state: Mapping[str, Tensor]) -> list[Problem]:
    """All that the configuration and the tensors tell; `groups` are the tensors of each module."""
    problems = [*_numbers(found)]
    if not state:
        problems.append(Problem("missing", "the file holds no tensors"))
    problems += _pairs(groups)
    if found.method == "LORA":
        problems += [*_ranks(config, groups), *_options(config, groups)]
    problems += [*_targets(config, groups), *_beside(config, found)]
    return problems


def _numbers(found: Inspection) -> Iterator[Problem]:
    bad = [t.key for t in found.tensors if not t.finite]
    if bad:
        yield Problem("not finite", f"NaN or infinite values in {listing(bad, 4)}: the outputs will not be usable")
    zero = [t.key for t in found.tensors if t.zero and not t.key.endswith(".bias")]
    if zero:
        text = f"{len(zero)} of {len(found.tensors)} tensors are all zero, as before training: {listing(zero, 4)}"
        yield Problem("zero", text, serious=False)


def _pairs(groups: Groups) -> Iterator[Problem]:
    for path, parts in groups.items():
        for one, other in PAIRS.items():
            if (one in parts) != (other in parts):
                have, lack = (one, other) if one in parts else (other, one)
                yield Problem("missing", f"{path!r} has {have} but no {lack}")


def _ranks(config: Any, groups: Groups) -> Iterator[Problem]:
    """Ranks of the tensors that are not those of the configuration, and factors that do not fit each other."""
    for path, parts in groups.items():
        A, B = (parts.get(f"lora_{s}.weight", parts.get(f"lora_embedding_{s}")) for s in "AB")
        parts_differ = getattr(config, "target_parameters", None) or config.use_bdlora or ".base_layer" in path
        if A is None or B is None or parts_differ:
            continue
        r = settings(config, path).r
        if min(A.dim(), B.dim()) < 2:
            yield Problem("rank", f"a factor of {path!r} has less than two axes: {tuple(A.shape)}, {tuple(B.shape)}")
        elif A.shape[0] != r:
            yield Problem("rank", f"{path!r} has rank {A.shape[0]} in the file and {r} in the configuration")
        elif not B.shape[1] or A.shape[0] % B.shape[1] or (B.dim() == 2 and A.shape[0] != B.shape[1]):
            yield Problem(
                "rank", f"the factors of {path!r}, {tuple(A.shape)} and {tuple(B.shape)}, have no common rank"
            )


def _options(config: Any, groups: Groups) -> Iterator[Problem]:
    """Tensors of options that the configuration has off, and options that have no tensors."""
    for name, tensors in (
        ("use_dora", ("lora_magnitude_vector", "lora_magnitude_vector.weight")),
        ("lora_bias", ("lora_B.bias",)),
    ):
        wanted = {p for p in groups if getattr(settings(config, p), name)}
        there = {p for p, parts in groups.items() if any(t in parts for t in tensors)}
        without = {p for p in wanted - there if "lora_B.weight" in groups[p] or name == "use_dora"}
        if without:
            text = f"{name}=True, but {listing(sorted(without), 4)} have no {tensors[0]}"
            yield Problem("missing", text)
        if there - wanted:
            yield Problem("unexpected", f"{tensors[0]} of {listing(sorted(there - wanted), 4)}, with {name}=False")


def _targets(config: Any, groups: Groups) -> Iterator[Problem]:
    """Entries of `target_modules` without tensors, and tensors of modules that none of them selects."""
    wanted = getattr(config, "target_modules", None)
    if not wanted or wanted in SHORTHANDS or not groups or config.is_adaption_prompt:
        return
    selector = Selector(wanted, "target_modules")
    named = [p for p in groups if p not in ("", SHARED)]
    paths = [p if selector.find(p) is not None else p.replace(".base_layer", "") for p in named]
    strange = [p for p in paths if selector.find(p) is None and not _is_inside(p, selector)]
    if strange and not any(getattr(config, name, None) for name in FURTHER):
        hint = nearest(strange[0].rpartition(".")[2], selector.entries)
        yield Problem("unexpected", f"tensors of {listing(strange, 4)}, which target_modules does not select.{hint}")
    unused = selector.unused()
    if unused and SHARED not in groups:
        yield Problem("missing", f"target_modules has {listing(unused)}, for which the file has no tensors")


def _is_inside(path: str, selector: Selector) -> bool:
    """Whether it is a part of a target, as the projections of an attention module are."""
    return selector.find(path.rpartition(".")[0]) is not None


def _beside(config: Any, found: Inspection) -> Iterator[Problem]:
    """Modules that are trained as a whole, and tensors that nothing in the configuration explains."""
    saved = [e for e in getattr(config, "modules_to_save", None) or () if e]
    names = {k.rpartition(".")[0] for k in found.others}
    absent = [e for e in saved if not any(n == e or n.endswith("." + e) or f"{e}." in n + "." for n in names)]
    if absent and not _heads(config, absent):
        yield Problem("missing", f"modules_to_save has {listing(absent)}, for which the file has no tensors")
    biases = getattr(config, "bias", "none") != "none"
    strange = [k for k in found.others if not _explained(k, saved, biases)]
    if strange and found.targets:
        text = f"{listing(strange, 4)} belong to no target and no modules_to_save: whole weights saved beside, or lost"
        yield Problem("unexpected", text, serious=False)


def _heads(config: Any, names: list[str]) -> bool:
    """Whether these are the names that a task adds on suspicion: a model has one of them."""
    return getattr(config, "task_type", None) in ("SEQ_CLS", "TOKEN_CLS") and {*names} <= {"classifier", "score"}


def _explained(key: str, saved: list[str], biases: bool) -> bool:
    path = f".{key.rpartition('.')[0]}."
    return (
        any(f".{e}." in path for e in saved)
        or (biases and key.endswith(".bias"))
        or "trainable_tokens_delta" in key
        or "." not in key.removeprefix("base_model.")
    )
