"""Filters of the page of `--report`, by class and by decision. They are CSS alone: the page runs no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from convline.html import Html, HtmlContent, element, elide_middle, printable
from serving.records import UNSURE, Prediction

CERTAIN = "certain"
LONGEST_NAME = 60  # characters of a class in the list
# what is hidden where a class is chosen; the rule of a class shows its images again
HIDE_OTHERS = ":where(body:has(#class-filter option:not(:first-child):checked)) :is(.tile,.group){display:none}"
# stronger than the rules of classes
HIDE_DECISIONS = (
    f"body:has([value={CERTAIN}]:checked) .{UNSURE},body:has([value={UNSURE}]:checked) .{CERTAIN}"
    "{display:none!important}"
)


class Filters:
    """Lists to choose a class and, where there is a threshold, a decision from. `labels` are the classes to choose
    from; images of others are shown only while no class is chosen."""

    def __init__(self, labels: Sequence[str], has_decisions: bool) -> None:
        self._labels = sorted(labels)
        self._has_decisions = has_decisions
        self._css_classes = {label: f"class-{number}" for number, label in enumerate(self._labels)}

    def css_classes(self, entries: Iterable[Prediction]) -> list[str]:
        """Of an element that shows these entries: it is hidden where the filters leave none of them."""
        shown = list(entries)
        found = {self._css_classes[entry.labels[0]] for entry in shown if entry.labels[0] in self._css_classes}
        decisions = {UNSURE if entry.decision == UNSURE else CERTAIN for entry in shown if entry.decision is not None}
        return [*sorted(found), *(decisions if len(decisions) == 1 else ())]

    def toolbar(self) -> HtmlContent:
        """Empty where there is nothing to choose."""
        lists = []
        if len(self._labels) > 1:
            names = [(self._css_classes[label], printable(label)) for label in self._labels]
            lists.append(_choice("class", "all classes", names))
        if self._has_decisions:
            lists.append(_choice("decision", "all", [(CERTAIN, CERTAIN), (UNSURE, UNSURE)]))
        return element("div", "Show", lists, class_="toolbar", role="group", aria_label="Filters") if lists else ""

    def style(self) -> str:
        """The CSS that makes the lists filter; empty where there is nothing to choose."""
        rules = [HIDE_DECISIONS] if self._has_decisions else []
        if len(self._labels) > 1:
            rules.append(HIDE_OTHERS)
            rules += [
                f'body:has([value="{css_class}"]:checked) .{css_class}{{display:block}}'
                for css_class in self._css_classes.values()
            ]
        return "".join(f"{rule}\n" for rule in rules)


def _choice(name: str, everything: str, options: Sequence[tuple[str, str]]) -> Html:
    listed = [element("option", everything, value="")]
    listed += [element("option", elide_middle(text, LONGEST_NAME), value=value) for value, text in options]
    # without autocomplete=off, a page that is loaded again would begin with a filter
    return element("label", name, " ", element("select", listed, id=f"{name}-filter", autocomplete="off"))
