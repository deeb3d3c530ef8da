//! Several processes in one view, and the picture of it for `docs/cli.md`.

use std::fmt::Write;
use std::fs;

use support::{RedisServer, Terminal};
use vt100::{Cell, Color, Screen};

use super::load::{HOT, Load, STUCK, WAITING};
use super::{has, row, top};
use crate::tool::bare;

/// Names the file for the picture, if one is wanted.
const FILE: &str = "SHARDLOCK_TEST_PICTURE";

#[test]
fn processes_are_merged_and_a_dead_one_is_named() {
    let server = RedisServer::start();
    let (one, mut two) = (Load::start(&server, true), Load::start(&server, false));
    let terminal = top(&[&one.address, "--admin", &two.address]);
    let lines = terminal.until("both processes are merged, with rates", |lines| {
        let is_held = row(lines, STUCK).is_some_and(|row| row[1] == one.process() && row[3] == WAITING.to_string());
        is_held && row(lines, HOT).is_some_and(|row| row[6].parse::<f64>().is_ok_and(|rate| rate > 0.0))
    });
    assert!(lines[0].starts_with(" shardlock top  2 processes "), "{lines:#?}");
    assert_eq!(
        lines.iter().filter(|line| line.starts_with(HOT)).count(),
        1,
        "{lines:#?}"
    );
    if let Ok(file) = std::env::var(FILE) {
        // After some seconds the rates are steady.
        let args = ["top", &one.address, &two.address];
        let (terminal, mut frames) = (Terminal::open(bare(&args), 18, 80), 0);
        let mut last = Vec::new();
        terminal.until("the rates have settled", |lines| {
            if lines != last {
                last = lines.to_vec();
                frames += 1;
            }
            frames > 16
        });
        fs::write(file, svg(&terminal.screen())).unwrap();
    }
    two.worker.kill();
    let lines = terminal.shows("2 processes, 1 unavailable");
    assert!(has(&lines, &format!("{} unavailable for ", two.address)), "{lines:#?}");
    assert!(row(&lines, HOT).is_some(), "{lines:#?}");
}

const CELL: (f64, f64) = (8.4, 18.0);
const MARGIN: f64 = 14.0;
const INK: &str = "#d8dee9";
const PAPER: &str = "#1b1f27";

/// The properties of a cell that affect its appearance.
#[derive(Debug, Clone, PartialEq)]
struct Look {
    ink: String,
    paper: String,
    bold: bool,
    dim: bool,
    underlined: bool,
}

fn look(cell: &Cell) -> Look {
    let (ink, paper) = (colour(cell.fgcolor(), INK), colour(cell.bgcolor(), PAPER));
    let (ink, paper) = if cell.inverse() { (paper, ink) } else { (ink, paper) };
    Look {
        ink,
        paper,
        bold: cell.bold(),
        dim: cell.dim(),
        underlined: cell.underline(),
    }
}

fn colour(colour: Color, usual: &str) -> String {
    const NAMED: [&str; 8] = [
        "#3b4252", "#ff6b70", "#9ece6a", "#e5c07b", "#61afef", "#c678dd", "#56c8d8", "#e5e9f0",
    ];
    match colour {
        Color::Default => usual.to_owned(),
        Color::Idx(number) => NAMED[usize::from(number % 8)].to_owned(),
        Color::Rgb(red, green, blue) => format!("#{red:02x}{green:02x}{blue:02x}"),
    }
}

/// The screen as an SVG: a rectangle and a text for each run of cells with the same look.
fn svg(screen: &Screen) -> String {
    let (rows, columns) = screen.size();
    let (rows, columns) = (rows.get(), columns.get());
    let width = f64::from(columns) * CELL.0 + 2.0 * MARGIN;
    let height = f64::from(rows) * CELL.1 + 2.0 * MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.1} {height:.1}\" \
         role=\"img\" aria-label=\"shardlock top in a terminal of {columns} by {rows}\">\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"{PAPER}\"/>\n\
         <g font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"14\" xml:space=\"preserve\">\n"
    );
    for row in 0..rows {
        let mut column = 0;
        while column < columns {
            let Some(first) = screen.cell(row, column) else { break };
            let (start, look_of_run) = (column, look(first));
            let mut text = String::new();
            while let Some(cell) = screen.cell(row, column).filter(|cell| look(cell) == look_of_run) {
                text.push_str(if cell.has_contents() { cell.contents() } else { " " });
                column += 1;
            }
            run(&mut svg, row, start, column - start, &text, &look_of_run);
        }
    }
    svg.push_str("</g>\n</svg>\n");
    svg
}

fn run(svg: &mut String, row: u16, column: u16, cells: u16, text: &str, look: &Look) {
    let (x, y) = (MARGIN + f64::from(column) * CELL.0, MARGIN + f64::from(row) * CELL.1);
    let width = f64::from(cells) * CELL.0;
    if look.paper != PAPER {
        let (paper, height) = (&look.paper, CELL.1);
        writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{paper}\"/>"
        )
        .unwrap();
    }
    if text.trim().is_empty() && !look.underlined {
        return;
    }
    let mut style = format!("fill=\"{}\"", look.ink);
    for (wanted, attribute) in [
        (look.bold, " font-weight=\"bold\""),
        (look.dim, " opacity=\"0.6\""),
        (look.underlined, " text-decoration=\"underline\""),
    ] {
        style.push_str(if wanted { attribute } else { "" });
    }
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let base = y + CELL.1 * 0.75;
    writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{base:.1}\" textLength=\"{width:.1}\" {style}>{text}</text>"
    )
    .unwrap();
}
