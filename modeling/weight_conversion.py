"""Renaming and reshaping another model's weights into ours, by rules that are checked before anything is loaded.

A conversion is a list of [`Rule`]s and a list of weights that are left out on purpose. [`check_rules`] holds them
against the names and shapes in the source's files and those of the target model (on the meta device) and names every
weight that is missing, unknown or of another shape; [`apply_rules`] then makes one rule's weights at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch

Shapes = Mapping[str, tuple[int, ...]]
# A message names at most this many weights of a kind.
NAMED_AT_MOST = 20


@dataclass(frozen=True)
class Rule:
    """How some weights of the source become some of the target.

    Attributes:
        sources: Names in the source.
        targets: Names in the target.
        convert: From the source's tensors to the target's, in order; one tensor may be returned as it is. By default
            the only tensor, unchanged. It must run on the meta device too.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    convert: Callable = field(default=lambda tensor: tensor, repr=False)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.convert(*tensors)
        return made if isinstance(made, tuple) else (made,)


@dataclass(frozen=True)
class Dropped:
    """Weights of the source that the target has no use for.

    Attributes:
        prefix: What their names begin with.
        reason: Why.
    """

    prefix: str
    reason: str


def rename(source: str, target: str) -> Rule:
    """A weight that only changes its name."""
    return Rule((source,), (target,))


def rename_module(source: str, target: str, parameters: Sequence[str] = ("weight", "bias")) -> list[Rule]:
    """A module's parameters that only change the module's name."""
    return [rename(f"{source}.{name}", f"{target}.{name}") for name in parameters]


def check_rules(rules: Sequence[Rule], dropped: Sequence[Dropped], source: Shapes, target: Shapes) -> None:
    """Hold a conversion against both sides' names and shapes.

    Args:
        rules: The rules.
        dropped: What is left out.
        source: Names and shapes in the source's files.
        target: Names and shapes of the model's weights.

    Raises:
        ValueError: If a weight is missing, is neither converted nor dropped, or has another shape than the model's, or
            if a weight of the model is made by no rule. Each is named.
    """
    needed = {name for rule in rules for name in rule.sources}
    missing = sorted(needed - set(source))
    unknown = sorted(name for name in set(source) - needed if not any(name.startswith(own.prefix) for own in dropped))
    made, misshaped = set(), []
    for rule in rules:
        if not set(rule.sources) <= set(source):
            made.update(rule.targets)
            continue
        shapes = _shapes_made(rule, source)
        for index, name in enumerate(rule.targets):
            made.add(name)
            if name in target and (shapes is None or shapes[index] != tuple(target[name])):
                given = ", ".join(f"{own} {tuple(source[own])}" for own in rule.sources)
                misshaped.append(f"{given} does not give {name} {tuple(target[name])}")
    problems = []
    for kind, names in (
        ("are missing", missing),
        ("are not known", unknown),
        ("have another shape", misshaped),
        ("of the model have no source", sorted(set(target) - made)),
        ("have no place in the model", sorted(made - set(target))),
    ):
        if names:
            more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
            problems.append(f"{len(names)} weights {kind}: {'; '.join(names[:NAMED_AT_MOST])}{more}.")
    if problems:
        raise ValueError("The weights do not fit. " + " ".join(problems))


def apply_rules(
    rules: Sequence[Rule], load: Callable[[str], torch.Tensor], skip: Set[str] = frozenset()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight of the target, one rule at a time.

    Args:
        rules: The rules.
        load: Reads a weight of the source.
        skip: Names of the target; a rule that makes only such is not applied.
    """
    for rule in rules:
        if not set(rule.targets) <= skip:
            yield from zip(rule.targets, rule(*map(load, rule.sources)))


def bytes_made(rules: Sequence[Rule], source: Shapes, dtype_of: Callable[[str], torch.dtype]) -> int:
    """Bytes of all that the rules make of a source with these shapes and dtypes."""
    meta = {name: torch.empty(source[name], dtype=dtype_of(name), device="meta") for r in rules for name in r.sources}
    return sum(own.numel() * own.element_size() for _, own in apply_rules(rules, meta.__getitem__))


def _shapes_made(rule: Rule, source: Shapes) -> list[tuple[int, ...]] | None:
    """Shapes of what a rule makes; `None` where it cannot be applied to tensors of these shapes."""
    try:
        made = rule(*(torch.empty(source[name], device="meta") for name in rule.sources))
    except (RuntimeError, ValueError):
        return None
    return [tuple(own.shape) for own in made]
