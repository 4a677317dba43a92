"""Groups of images that stand on one side of every split: of one patient, video or house, or with the same pixels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from convline.console import log
from convline.errors import ConvlineError
from pipeline.preparing.skipped_files import escape_unprintable

NAMED = 3  # groups in a message


def groups_by_pattern(paths: Iterable[str], pattern: str) -> dict[str, str]:
    """The group of each path: what the first bracket of the regular expression matches in it, or all of the expression.

    Raises ConvlineError for an invalid expression, and for a path that it does not match.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConvlineError(f"--group-by {pattern!r} is not a regular expression: {error}") from error
    groups = {}
    for path in paths:
        match = compiled.search(path)
        group = match and (match[1] if compiled.groups else match[0])
        if not group:
            raise ConvlineError(f"--group-by {pattern!r} finds no group in {escape_unprintable(path)}")
        groups[path] = group
    return groups


def merged_groups(first: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.int64]:
    """A number for each image, int64 [n]: equal for images with the same pixels (see `first_equal`) and for those with
    the same name of a group, also by way of others. An empty name is no group; `names` may be empty as a whole."""
    if not names:
        return first
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rows = np.arange(len(first))
    leader: dict[str, int] = {}
    same_group = np.array([leader.setdefault(name, row) if name else row for row, name in enumerate(names)])
    links = (np.concatenate([rows, rows]), np.concatenate([first, same_group]))
    graph = coo_matrix((np.ones(2 * len(rows), bool), links), shape=(len(rows), len(rows)))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def check_groups(names: Sequence[str], rows: Mapping[str, NDArray[np.int64]], allow_leaks: bool) -> list[str]:
    """The names of groups that a source's own splits separate; `rows` are those of each split.

    Raises ConvlineError where there are any, unless they are allowed, which is logged.
    """
    if not names:
        return []
    splits_of: dict[str, set[str]] = {}
    for split, split_rows in rows.items():
        for row in split_rows.tolist():
            if names[row]:
                splits_of.setdefault(names[row], set()).add(split)
    separated = sorted(name for name, splits in splits_of.items() if len(splits) > 1)
    if separated:
        such_as = ", ".join(map(escape_unprintable, separated[:NAMED]))
        message = f"{len(separated)} of {len(splits_of)} groups are in two splits, such as {such_as}"
        if not allow_leaks:
            raise ConvlineError(f"{message}; move each to one of them, or give --allow-leaks")
        log(f"{message}: the figures on test may be too good")
    return separated
