"""Checks that the provisioning files only have fields that Grafana knows.

There is no maintained model of them, so the fields are those of Grafana's documentation.
"""

import typing
from pathlib import Path

import yaml

# A list means any number of its item; None means any value.
DATASOURCES = {
    "apiVersion": None,
    "datasources": [
        {
            "name": None,
            "uid": None,
            "type": None,
            "access": None,
            "url": None,
            "isDefault": None,
            "editable": None,
            "jsonData": {"httpMethod": None, "timeInterval": None, "prometheusType": None},
        }
    ],
}
DASHBOARDS = {
    "apiVersion": None,
    "providers": [
        {
            "name": None,
            "type": None,
            "folder": None,
            "disableDeletion": None,
            "allowUiUpdates": None,
            "updateIntervalSeconds": None,
            "options": {"path": None, "foldersFromFilesStructure": None},
        }
    ],
}


def mistakes(directory: Path) -> list[str]:
    found = []
    for folder, form in [("datasources", DATASOURCES), ("dashboards", DASHBOARDS)]:
        files = sorted((directory / folder).glob("*.yml"))
        if not files:
            found.append(f"{directory / folder} has no file")
        for file in files:
            found += [f"{file}: {wrong}" for wrong in unknown(yaml.safe_load(file.read_text()), form, "")]
    return found


def unknown(given: object, form: object, place: str) -> typing.Iterator[str]:
    if isinstance(form, list):
        if not isinstance(given, list):
            yield f"{place} is not a list"
            return
        for number, one in enumerate(given):
            yield from unknown(one, form[0], f"{place}[{number}]")
    elif isinstance(form, dict):
        if not isinstance(given, dict):
            yield f"{place} has no fields"
            return
        for name, value in given.items():
            if name in form:
                yield from unknown(value, form[name], f"{place}.{name}")
            else:
                yield f"{place}.{name} is not known to Grafana"
