#!/usr/bin/env python3
"""Generates grafana/dashboards/shardlock.json from panels.py, and checks it.

scripts/ensure-grafana-model prints the Python to run it with.

  dashboard.py --write         writes the dashboard
  dashboard.py --check [FILE]  checks that the dashboard, or FILE, fits Grafana's model and is the
                               one generated here
  dashboard.py --provisioning [DIRECTORY]
                               checks that the provisioning files, or those in DIRECTORY, only have
                               fields that Grafana knows
"""

import json
import sys
import tomllib
from pathlib import Path

from grafana_foundation_sdk.builders import bargauge, common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard

import model
import panels
import provisioning

FILE = Path(__file__).parent / "dashboards" / "shardlock.json"
PROVISIONING = Path(__file__).parent / "provisioning"
# The schema version of Grafana 11.0.
SCHEMA_VERSION = 39
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = 8
STAT_HEIGHT = 5
REFRESH = "10s"


def build() -> dashboard.Dashboard:
    board = (
        builders.Dashboard("shardlock")
        .uid("shardlock")
        .description("Locks: how many, how contended, how safe, and whether the store is the cause. METRICS.md describes the metrics.")
        .tags(["shardlock", "locks"])
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time("now-15m", "now")
        .refresh(REFRESH)
    )
    for variable in variables():
        board = board.with_variable(variable)
    for annotation in panels.ANNOTATIONS:
        mark = builders.AnnotationQuery().name(annotation.name).datasource(SOURCE).enable(True)
        board = board.annotation(mark.icon_color(annotation.color).expr(annotation.expression))
    for title, path, tooltip in panels.LINKS:
        link = builders.DashboardLink(title).type(dashboard.DashboardLinkType.LINK).icon("doc")
        board = board.link(link.url(f"{repository()}/blob/main/{path}").tooltip(tooltip).target_blank(True))
    number = 0
    for row in panels.ROWS:
        number += 1
        line = builders.Row(row.title).id(number).collapsed(row.is_collapsed)
        if not row.is_collapsed:
            board = board.with_row(line)
        for panel in row.panels:
            number += 1
            made = visual(panel).id(number)
            if row.is_collapsed:
                line = line.with_panel(made)
            else:
                board = board.with_panel(made)
        if row.is_collapsed:
            board = board.with_row(line)
    made = board.build()
    made.schema_version = SCHEMA_VERSION
    return made


def repository() -> str:
    """The address of the repository, as the packages have it."""
    manifest = tomllib.loads((Path(__file__).parent.parent / "Cargo.toml").read_text())
    return manifest["workspace"]["package"]["repository"]


def variables() -> list:
    source = builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    return [
        source,
        choice("job", "Job", "shardlock_shard_up", "job"),
        choice("instance", "Process", 'shardlock_shard_up{job=~"$job"}', "instance"),
        choice("class", "Class", f"shardlock_acquisitions_total{{{panels.PROCESS}}}", "class"),
        choice("shard", "Shard", f"shardlock_shard_up{{{panels.PROCESS}}}", "shard"),
    ]


def choice(name: str, label: str, series: str, of: str) -> builders.QueryVariable:
    """A variable for several values of a label, or all of them, which is the default."""
    query = {"qryType": 1, "query": f"label_values({series}, {of})", "refId": "PrometheusVariableQueryEditor-VariableQuery"}
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def visual(panel: panels.Panel):
    made = {
        panels.STAT: number,
        panels.RANKING: ranking,
        panels.PLAIN: lines,
        panels.BARS: bars,
    }[panel.look](panel)
    made = made.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit).span(panel.width)
    made = made.height(STAT_HEIGHT if panel.look == panels.STAT else HEIGHT)
    if panel.no_value is not None:
        made = made.no_value(panel.no_value)
    for letter, (expression, legend) in zip("ABCDEFGH", panel.targets):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter).datasource(SOURCE)
        is_momentary = panel.look == panels.RANKING or "$__range]" in expression
        made = made.with_target(query.instant() if is_momentary else query.range())
    return made


def lines(panel: panels.Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True).display_mode(looks.LegendDisplayMode.LIST).placement(looks.LegendPlacement.BOTTOM)
    tooltip = common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING)
    return timeseries.Panel().legend(legend).tooltip(tooltip).min(0).line_width(1).fill_opacity(10).show_points(looks.VisibilityMode.NEVER)


def bars(panel: panels.Panel) -> timeseries.Panel:
    """Bars, for rare events: a count per interval is more useful than a rate."""
    return lines(panel).draw_style(looks.GraphDrawStyle.BARS).fill_opacity(60)


def number(panel: panels.Panel) -> stat.Panel:
    made = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    made = made.graph_mode(looks.BigValueGraphMode.AREA).color_mode(looks.BigValueColorMode.VALUE)
    steps = [dashboard.Threshold(color="green")]
    if panel.bounds is not None:
        orange, red = panel.bounds
        if orange != red:
            steps.append(dashboard.Threshold(value=orange, color="orange"))
        steps.append(dashboard.Threshold(value=red, color="red"))
    bounds = builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)
    return made.thresholds(bounds).color_scheme(builders.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))


def ranking(panel: panels.Panel) -> bargauge.Panel:
    made = bargauge.Panel().orientation(looks.VizOrientation.HORIZONTAL).display_mode(looks.BarGaugeDisplayMode.GRADIENT)
    return made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).min(0)


def text() -> str:
    document = model.plain(build())
    # Fields of the data source, which the model does not have.
    for annotation, mark in zip(panels.ANNOTATIONS, document["annotations"]["list"]):
        mark["titleFormat"] = annotation.title
        mark["tagKeys"] = annotation.labels
    return json.dumps(document, indent=2) + "\n"


def check(file: Path) -> list[str]:
    found = file.read_text()
    wrong = model.mistakes(json.loads(found))
    if found != text():
        wrong.append("it is not what dashboard.py makes; change panels.py, then run dashboard.py --write")
    return wrong


def main(arguments: list[str]) -> int:
    match arguments:
        case ["--write"]:
            FILE.write_text(text())
            return 0
        case ["--check"]:
            wrong = check(FILE)
        case ["--check", file]:
            wrong = check(Path(file))
        case ["--provisioning"]:
            wrong = provisioning.mistakes(PROVISIONING)
        case ["--provisioning", directory]:
            wrong = provisioning.mistakes(Path(directory))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
