"""Loads a dashboard through the model of Grafana's schema, and reports what the model does not know.

The model ignores unknown fields when it reads a dashboard, so the result is written again and
compared: a field that is missing or different was misspelt. Parts that depend on a panel's kind are
only checked for known kinds, so the kind must be one of them.
"""

import enum
import json
import types
import typing

from grafana_foundation_sdk.cog import plugins, runtime
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

# The form in which Grafana stores the query of a Prometheus variable; the model accepts anything
# here.
VARIABLE_QUERY = {"qryType", "query", "refId"}
# Fields of an annotation that belong to the Prometheus data source, which the model does not have.
ANNOTATION_FIELDS = {"titleFormat", "tagKeys"}
# Panel fields that the model passes through unchecked. They must not be used, so that nothing is
# left unchecked.
UNCHECKED = {"links", "transformations", "libraryPanel"}


def plain(model: object) -> object:
    """The model in the form of plain JSON values."""
    return json.loads(json.dumps(model, cls=JSONEncoder))


def mistakes(document: dict) -> list[str]:
    """Everything in the document that does not fit Grafana's model, with its place."""
    plugins.register_default_plugins()
    try:
        model = dashboard.Dashboard.from_json(document)
        found = list(differences(without_open_fields(document), plain(model), "dashboard"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [f"Grafana's model can't read it: {type(error).__name__}: {error}"]
    found += wrong_words(model, "dashboard")
    found += wrong_open_parts(document)
    return found


def without_open_fields(document: dict) -> dict:
    """The document without the fields that `wrong_open_parts` checks."""
    marks = document.get("annotations", {}).get("list", [])
    known = [{name: value for name, value in mark.items() if name not in ANNOTATION_FIELDS} for mark in marks]
    return {**document, "annotations": {**document.get("annotations", {}), "list": known}}


def panels_of(document: dict) -> list[dict]:
    """All panels, including rows and what is in collapsed rows."""
    found = []
    for panel in document.get("panels", []):
        found += [panel, *(panel.get("panels") or [])]
    return found


def differences(given: object, kept: object, place: str) -> typing.Iterator[str]:
    """What the model does not preserve. Fields that it adds are defaults, and ignored."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name in kept:
                yield from differences(value, kept[name], f"{place}.{name}")
            else:
                yield f"{place}.{name}: Grafana's model has no such field"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept)):
            yield from differences(one, other, f"{place}[{number}]")
    elif given != kept:
        yield f"{place}: {given!r} is {kept!r} in Grafana's model"


def wrong_words(value: object, place: str) -> list[str]:
    """Values that are not in the enum of their field. The model itself accepts any."""
    if isinstance(value, (list, tuple)):
        return [wrong for number, one in enumerate(value) for wrong in wrong_words(one, f"{place}[{number}]")]
    if isinstance(value, dict):
        return [wrong for name, one in value.items() for wrong in wrong_words(one, f"{place}.{name}")]
    if not type(value).__module__.startswith("grafana_foundation_sdk.") or isinstance(value, enum.Enum):
        return []
    found = []
    hints = typing.get_type_hints(type(value))
    for name, part in vars(value).items():
        here = f"{place}.{name}"
        kinds = [kind for kind in alternatives(hints.get(name)) if isinstance(kind, type) and issubclass(kind, enum.Enum)]
        for kind in kinds:
            if part is not None and part not in [member.value for member in kind]:
                words = ", ".join(str(member.value) for member in kind)
                found.append(f"{here}: {part!r} is none of {words}")
        found += wrong_words(part, here)
    return found


def alternatives(hint: object) -> tuple:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def wrong_open_parts(document: dict) -> list[str]:
    found = []
    for mark in document.get("annotations", {}).get("list", []):
        wrong = [name for name in ANNOTATION_FIELDS if not isinstance(mark.get(name), str)]
        found += [f"annotation {mark.get('name')!r}: {name} is not a text" for name in wrong]
    for panel in panels_of(document):
        place = f"panel {panel.get('title')!r}"
        if panel["type"] != "row" and runtime.panelcfg_config(panel["type"]) is None:
            found.append(f"{place}: the model knows no kind of panel called {panel['type']!r}")
        found += [f"{place}: {name} is not checked by the model" for name in UNCHECKED if panel.get(name)]
        for target in panel.get("targets", []):
            # Without it, the model treats the query as one of an unknown kind, and accepts
            # everything in it.
            if target.get("datasource", {}).get("type") != "prometheus":
                found.append(f"{place}: a query that is not for prometheus")
    for variable in document.get("templating", {}).get("list", []):
        if variable["type"] == "query" and set(variable["query"]) != VARIABLE_QUERY:
            found.append(f"variable {variable['name']}: its query has {sorted(variable['query'])} and not {sorted(VARIABLE_QUERY)}")
    return found
