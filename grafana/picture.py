#!/usr/bin/env python3
"""Draws the dashboard as an SVG from the data of a Prometheus, for documents.

It reads dashboards/shardlock.json, sends each query of each panel to the Prometheus, and draws the
results at the places of the panels. It is a sketch: Grafana draws more (tooltips, gradients), and
this needs neither Grafana nor anything but Python's standard library.

  picture.py URL FILE [--minutes N] [--rows TITLE...]

    URL        the address of the Prometheus, such as http://127.0.0.1:9090
    FILE       the SVG to write
    --minutes  how far back to look; 10 if absent
    --rows     the titles of the rows to draw; all that are not collapsed if absent
"""

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from html import escape
from pathlib import Path

DASHBOARD = Path(__file__).parent / "dashboards" / "shardlock.json"
# The width of a column of Grafana's grid and the height of its unit, in pixels.
COLUMN, UNIT = 50, 26
COLUMNS = 24
GAP = 6
POINTS = 120
SERIES_MAX = 12
INK, FAINT, PAPER, PANEL, LINE = "#d8d9da", "#8e8e94", "#111217", "#181b1f", "#2c3235"
COLORS = ["#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#f2495c", "#b877d9", "#8ab8ff", "#fade2a", "#96d98d", "#ffb357", "#ff7383", "#ca95e5"]
MARKS = {"red": "#f2495c", "purple": "#b877d9", "blue": "#5794f2"}


class Source:
    """The Prometheus, and the time range of the picture."""

    def __init__(self, url: str, minutes: float):
        self.url = url.rstrip("/")
        self.end = time.time()
        self.start = self.end - minutes * 60
        self.step = max(minutes * 60 / POINTS, 1)

    def ask(self, path: str, **parameters: object) -> list:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=30) as response:
            return json.load(response)["data"]["result"]

    def filled(self, expression: str) -> str:
        """The expression with all variables set to everything."""
        whole = f"{round(self.end - self.start)}s"
        filled = expression.replace("$__rate_interval", "30s").replace("$__range", whole)
        return re.sub(r"\$\w+", ".*", filled)

    def series(self, expression: str) -> list[tuple[dict, list[tuple[float, float]]]]:
        found = self.ask("query_range", query=self.filled(expression), start=self.start, end=self.end, step=self.step)
        kept = []
        for one in found:
            points = [(at, float(value)) for at, value in one["values"] if math.isfinite(float(value))]
            if points:
                kept.append((one["metric"], points))
        return kept

    def now(self, expression: str) -> list[tuple[dict, float]]:
        found = self.ask("query", query=self.filled(expression), time=self.end)
        return [(one["metric"], float(one["value"][1])) for one in found if math.isfinite(float(one["value"][1]))]


def shown(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        for factor, name in [(1, "s"), (1e3, "ms")]:
            if abs(value) * factor >= 1 or value == 0:
                return f"{value * factor:.3g} {name}"
        return f"{value * 1e6:.3g} µs"
    suffix = {"ops": " ops/s", "reqps": " req/s"}.get(unit, "")
    if abs(value) >= 1e3:
        return f"{value / 1e3:.3g} K{suffix}"
    return f"{value:.3g}{suffix}"


def named(legend: str, labels: dict) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend).strip()


def ceiling(value: float) -> float:
    """A round number that is not smaller."""
    if value <= 0:
        return 1
    power = 10 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 2.5, 5, 10) if power * step >= value)


def text(x: float, y: float, words: str, size: int = 11, color: str = INK, anchor: str = "start", weight: int = 400) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{color}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'


def cut(words: str, width: float, size: int = 11) -> str:
    most = max(int(width / (size * 0.56)), 4)
    return words if len(words) <= most else words[: most - 1] + "…"


class Box:
    """The place of a panel."""

    def __init__(self, place: dict, top: float):
        self.x = place["x"] * COLUMN + GAP / 2
        self.y = top
        self.width = place["w"] * COLUMN - GAP
        self.height = place["h"] * UNIT - GAP

    def frame(self, title: str) -> str:
        area = f'<rect x="{self.x:.0f}" y="{self.y:.0f}" width="{self.width:.0f}" height="{self.height:.0f}" rx="3" fill="{PANEL}" stroke="{LINE}"/>'
        return area + text(self.x + 10, self.y + 18, cut(title, self.width - 20, 12), 12, weight=600)

    def nothing(self, panel: dict) -> str:
        words = panel["fieldConfig"]["defaults"].get("noValue") or "No data"
        return text(self.x + self.width / 2, self.y + self.height / 2 + 8, words, 11, FAINT, "middle")


def lines(panel: dict, box: Box, source: Source, marks: list) -> str:
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    is_bars = panel["fieldConfig"]["defaults"].get("custom", {}).get("drawStyle") == "bars"
    found = []
    for target in panel["targets"]:
        for labels, points in source.series(target["expr"]):
            found.append((named(target["legendFormat"], labels), points))
    if not found:
        return box.nothing(panel)
    # The largest first, as in a legend that is sorted.
    found = sorted(found, key=lambda one: -max(value for _, value in one[1]))[:SERIES_MAX]
    most = ceiling(max(value for _, points in found for _, value in points))
    left, right, top, bottom = box.x + 62, box.x + box.width - 12, box.y + 30, box.y + box.height - 44
    across = lambda at: left + (at - source.start) / (source.end - source.start) * (right - left)
    up = lambda value: bottom - value / most * (bottom - top)
    drawn = []
    for color, begin, end in marks:
        x, width = across(begin), max(across(end) - across(begin), 1)
        drawn.append(f'<rect x="{x:.1f}" y="{top:.0f}" width="{width:.1f}" height="{bottom - top:.0f}" fill="{color}" fill-opacity="0.15"/>')
        drawn.append(f'<path d="M{x:.1f} {top:.0f}V{bottom:.0f}" stroke="{color}" stroke-dasharray="3 2" fill="none"/>')
    for part in range(3):
        value = most * part / 2
        drawn.append(f'<path d="M{left:.0f} {up(value):.0f}H{right:.0f}" stroke="{LINE}" fill="none"/>')
        drawn.append(text(left - 6, up(value) + 4, shown(value, unit), 10, FAINT, "end"))
    for part in range(4):
        at = source.start + (source.end - source.start) * (part + 0.5) / 4
        drawn.append(text(across(at), bottom + 13, time.strftime("%H:%M", time.gmtime(at)), 10, FAINT, "middle"))
    for number, (_, points) in enumerate(found):
        color = COLORS[number % len(COLORS)]
        if is_bars:
            width = max((right - left) / POINTS - 0.5, 1)
            bars = [f"M{across(at):.1f} {bottom:.0f}V{up(value):.1f}" for at, value in points if value > 0]
            drawn.append(f'<path d="{"".join(bars)}" stroke="{color}" stroke-width="{width:.1f}" fill="none"/>')
            continue
        path, before = [], None
        for at, value in points:
            is_joined = before is not None and at - before <= source.step * 1.5
            path.append(f"{'L' if is_joined else 'M'}{across(at):.1f} {up(value):.1f}")
            before = at
        drawn.append(f'<path d="{"".join(path)}" stroke="{color}" stroke-width="1.2" fill="none"/>')
    x = box.x + 12
    for number, (name, _) in enumerate(found):
        width = len(name) * 6 + 22
        if x + width > box.x + box.width - 20:
            drawn.append(text(x, box.y + box.height - 10, "…", 10, FAINT))
            break
        drawn.append(f'<rect x="{x:.0f}" y="{box.y + box.height - 15:.0f}" width="10" height="3" fill="{COLORS[number % len(COLORS)]}"/>')
        drawn.append(text(x + 14, box.y + box.height - 10, name, 10, FAINT))
        x += width
    return "".join(drawn)


def number(panel: dict, box: Box, source: Source, _: list) -> str:
    defaults = panel["fieldConfig"]["defaults"]
    found = source.now(panel["targets"][0]["expr"])
    if not found:
        return box.nothing(panel)
    value = found[0][1]
    color = "green"
    for step in defaults.get("thresholds", {}).get("steps", []):
        if step.get("value") is None or value >= step["value"]:
            color = step["color"]
    color = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}[color]
    return text(box.x + box.width / 2, box.y + box.height / 2 + 20, shown(value, defaults.get("unit", "short")), 28, color, "middle", 600)


def ranking(panel: dict, box: Box, source: Source, _: list) -> str:
    target = panel["targets"][0]
    found = sorted(source.now(target["expr"]), key=lambda one: -one[1])[:8]
    if not found:
        return box.nothing(panel)
    room = (box.height - 40) / len(found)
    most = max(value for _, value in found) or 1
    drawn = []
    for number, (labels, value) in enumerate(found):
        y = box.y + 30 + number * room
        width = (box.width - 320) * value / most
        drawn.append(text(box.x + 200, y + room / 2 + 4, cut(named(target["legendFormat"], labels), 180), 11, INK, "end"))
        drawn.append(f'<rect x="{box.x + 210:.0f}" y="{y:.0f}" width="{width:.0f}" height="{room - 4:.0f}" fill="{COLORS[0]}" fill-opacity="0.7"/>')
        drawn.append(text(box.x + 218 + width, y + room / 2 + 4, shown(value, "short"), 11, INK))
    return "".join(drawn)


def annotations(document: dict, source: Source) -> list[tuple[str, float, float]]:
    """The colour, begin and end of each mark. Points that follow each other are one mark."""
    found = []
    for mark in document["annotations"]["list"]:
        for _, points in source.series(mark["expr"]):
            begin = before = None
            for at, value in [*points, (math.inf, 0)]:
                is_on = value >= 1
                if begin is not None and (not is_on or at - before > source.step * 1.5):
                    found.append((MARKS[mark["iconColor"]], begin, before))
                    begin = None
                if is_on and begin is None:
                    begin = at
                before = at
    return found


def rows(document: dict, wanted: list[str] | None) -> list[tuple[str, list[dict]]]:
    found: list[tuple[str, bool, list[dict]]] = []
    for panel in document["panels"]:
        if panel["type"] == "row":
            found.append((panel["title"], bool(panel.get("collapsed")), list(panel.get("panels") or [])))
        else:
            found[-1][2].append(panel)
    return [(title, panels) for title, is_closed, panels in found if (title in wanted if wanted else not is_closed)]


def draw(document: dict, source: Source, wanted: list[str] | None) -> str:
    looks = {"timeseries": lines, "stat": number, "bargauge": ranking}
    marks = annotations(document, source)
    drawn, top = [], 8.0
    for title, panels in rows(document, wanted):
        drawn.append(text(10, top + 17, f"⌄ {title}", 14, INK, weight=600))
        top += UNIT
        first = min(panel["gridPos"]["y"] for panel in panels)
        for panel in panels:
            box = Box(panel["gridPos"], top + (panel["gridPos"]["y"] - first) * UNIT)
            drawn += [box.frame(panel["title"]), looks[panel["type"]](panel, box, source, marks)]
        top += (max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) - first) * UNIT + 6
    width = COLUMNS * COLUMN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top:.0f}" font-family="Inter, Helvetica, Arial, DejaVu Sans, sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{top:.0f}" fill="{PAPER}"/>', *drawn, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rows", nargs="+")
    options = parser.parse_args()
    document = json.loads(DASHBOARD.read_text())
    options.file.write_text(draw(document, Source(options.url, options.minutes), options.rows))


if __name__ == "__main__":
    main()
