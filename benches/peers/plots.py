"""Plots as SVG, readable on a light and on a dark page: each has its own background."""

import math
from html import escape

LEFT, RIGHT, WIDTH, BAR, GAP = 170, 150, 920, 15, 5
STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de } text { fill: #1f2328; font: 12px system-ui, sans-serif }
  .title { font-size: 16px; font-weight: 600 } .panel { font-size: 13px; font-weight: 600 } .tick { fill: #656d76; font-size: 10px }
  .grid { stroke: #d8dee4 } .ours { fill: #d1495b } .peer { fill: #4a7fb5 } .limit { fill: #8c959f } .none { fill: #9a6700 }
  .range { stroke-width: 3 } .range.ours { stroke: #d1495b } .range.peer { stroke: #4a7fb5 } .range.limit { stroke: #8c959f }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #30363d } text { fill: #e6edf3 } .tick { fill: #8d96a0 } .grid { stroke: #21262d }
    .ours { fill: #f2788a } .peer { fill: #6ca6e0 } .none { fill: #d29922 }
    .range.ours { stroke: #f2788a } .range.peer { stroke: #6ca6e0 }
  }
"""


def short(value):
    """The shortest readable form: 1.2M, 45k, 312, 4.5, 0.02."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


class Axis:
    """Maps values to positions, with round ticks."""

    def __init__(self, values, logarithmic):
        positive = [value for value in values if value > 0]
        self.logarithmic = logarithmic
        if logarithmic:
            self.low = math.floor(math.log10(min(positive, default=1)))
            # A bar that starts at the lowest value would have no length.
            if positive and math.log10(min(positive)) - self.low < 0.15:
                self.low -= 1
            self.high = max(self.low + 1, math.ceil(math.log10(max(positive, default=10)) - 1e-9))
            self.ticks = [10.0**power for power in range(self.low, self.high + 1)]
        else:
            self.low, self.high = 0.0, 100.0
            self.ticks = [0.0, 25.0, 50.0, 75.0, 100.0]

    def at(self, value):
        scaled = math.log10(value) if self.logarithmic and value > 0 else self.low if self.logarithmic else value
        share = (scaled - self.low) / (self.high - self.low)
        return LEFT + min(1.0, max(0.0, share)) * (WIDTH - LEFT - RIGHT)


def bars(title, panels, logarithmic):
    """One bar for each contestant."""

    def draw(axis, role, values, y):
        end = axis.at(values[0])
        return [
            f'<rect class="{role}" x="{LEFT}" y="{y}" width="{max(1.0, end - LEFT):.1f}" height="{BAR}"/>',
            f'<text x="{end + 5:.1f}" y="{y + 12}">{short(values[0])}</text>',
        ]

    return figure(title, panels, logarithmic, draw)


def ranges(title, panels):
    """A line from the median to the longest wait of each contestant, with a mark for the 99th
    percentile.
    """

    def draw(axis, role, values, y):
        first, middle, last = (axis.at(value) for value in values)
        centre = y + BAR / 2
        return [
            f'<line class="range {role}" x1="{first:.1f}" y1="{centre}" x2="{last:.1f}" y2="{centre}"/>',
            f'<circle class="{role}" cx="{first:.1f}" cy="{centre}" r="5"/>',
            f'<rect class="{role}" x="{middle - 2:.1f}" y="{y}" width="4" height="{BAR}"/>',
            f'<circle class="{role}" cx="{last:.1f}" cy="{centre}" r="3"/>',
            f'<text x="{last + 8:.1f}" y="{y + 12}">{" / ".join(map(short, values))}</text>',
        ]

    return figure(title, panels, True, draw)


def figure(title, panels, logarithmic, draw):
    parts, y = [f'<text class="title" x="20" y="32">{escape(title)}</text>'], 50
    for name, rows in panels:
        axis = Axis([value for _, _, values in rows for value in values or []], logarithmic)
        parts.append(f'<text class="panel" x="20" y="{y + 16}">{escape(name)}</text>')
        y += 26
        bottom = y + len(rows) * (BAR + GAP)
        for tick in axis.ticks:
            x = axis.at(tick)
            parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y - 2}" x2="{x:.1f}" y2="{bottom}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 12}" text-anchor="middle">{short(tick)}</text>')
        for label, role, values in rows:
            parts.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
            if values:
                parts += draw(axis, role, values, y)
            else:
                parts.append(f'<text class="none" x="{LEFT + 5}" y="{y + 12}">no result</text>')
            y += BAR + GAP
        y = bottom + 26
    height = y + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
