//! Plots the distribution of the waits: wait time over percentile. Both axes are logarithmic, so
//! that the rare long waits get as much room as the many short ones.

use std::fmt::{self, Write};

use hdrhistogram::Histogram;

const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 450.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 60.0;

/// The maximum number of nines on the axis of percentiles: 99.99999 %.
const NINES_MAX: f64 = 7.0;

/// The number of steps of the curve.
const STEPS: u32 = 400;

/// Draws the picture with this title.
pub(super) fn svg(waits: &Histogram<u64>, title: &str) -> String {
    let mut svg = String::new();
    // Writing to a `String` can't fail.
    Plot::of(waits).write(&mut svg, waits, title).ok();
    svg
}

/// The ranges of the axes.
struct Plot {
    /// The axis runs from zero nines (0 %) to this many.
    nines: f64,
    /// Powers of ten, in nanoseconds.
    lowest: f64,
    highest: f64,
}

impl Plot {
    fn of(waits: &Histogram<u64>) -> Self {
        let power = |wait_ns: u64| (wait_ns.max(1) as f64).log10();
        let lowest = power(waits.min()).floor();
        Self {
            // Beyond this, a percentile stands for less than one wait.
            nines: (waits.len().max(10) as f64).log10().ceil().clamp(1.0, NINES_MAX),
            lowest,
            highest: power(waits.max()).ceil().max(lowest + 1.0),
        }
    }

    fn x(&self, nines: f64) -> f64 {
        LEFT + nines / self.nines * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, power: f64) -> f64 {
        HEIGHT - BOTTOM - (power - self.lowest) / (self.highest - self.lowest) * (HEIGHT - TOP - BOTTOM)
    }

    fn write(&self, out: &mut String, waits: &Histogram<u64>, title: &str) -> fmt::Result {
        writeln!(
            out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">"
        )?;
        writeln!(out, "<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>")?;
        let title = escaped(title);
        writeln!(
            out,
            "<text x=\"{LEFT}\" y=\"24\" font-size=\"16\">Waits for a lock</text>"
        )?;
        writeln!(out, "<text x=\"{LEFT}\" y=\"44\" fill=\"#555\">{title}</text>")?;
        self.write_axes(out)?;
        self.write_curve(out, waits)?;
        writeln!(out, "</svg>")
    }

    fn write_axes(&self, out: &mut String) -> fmt::Result {
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for power in self.lowest as i32..=self.highest as i32 {
            let y = self.y(f64::from(power));
            writeln!(out, "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#ddd\"/>")?;
            writeln!(
                out,
                "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 8.0,
                y + 4.0,
                format_power(power)
            )?;
        }
        for nines in 0..=self.nines as i32 {
            let x = self.x(f64::from(nines));
            writeln!(out, "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/>")?;
            let share = 100.0 * (1.0 - 0.1_f64.powi(nines));
            let digits = (nines - 2).max(0) as usize;
            writeln!(
                out,
                "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{share:.digits$} %</text>",
                bottom + 20.0
            )?;
        }
        writeln!(
            out,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">share of waits at most this long</text>",
            f64::midpoint(LEFT, right),
            bottom + 44.0
        )
    }

    fn write_curve(&self, out: &mut String, waits: &Histogram<u64>) -> fmt::Result {
        write!(out, "<path fill=\"none\" stroke=\"#1f5fa8\" stroke-width=\"2\" d=\"")?;
        for step in 0..=STEPS {
            let nines = self.nines * f64::from(step) / f64::from(STEPS);
            let wait_ns = waits.value_at_quantile(1.0 - 10_f64.powf(-nines));
            let (x, y) = (self.x(nines), self.y((wait_ns.max(1) as f64).log10()));
            write!(out, "{}{x:.1} {y:.1}", if step == 0 { "M" } else { "L" })?;
        }
        writeln!(out, "\"/>")
    }
}

/// Formats a power of ten of nanoseconds.
fn format_power(power: i32) -> String {
    let (unit, smaller) = match power {
        ..=2 => ("ns", 0),
        3..=5 => ("us", 3),
        6..=8 => ("ms", 6),
        9.. => ("s", 9),
    };
    format!("{} {unit}", 10_f64.powi(power - smaller))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::wait_histogram::histogram;

    #[test]
    fn the_curve_stays_within_the_axes_even_without_waits() {
        let mut waits = histogram().unwrap();
        for count in [0, 1, 100_000] {
            waits.record_n(250_000, count).unwrap();
            waits.saturating_record(u64::MAX * (count / 100_000));
            let svg = svg(&waits, "a & b < c");
            assert!(svg.contains("a &amp; b &lt; c"), "{svg}");
            let curve = svg.rsplit_once("d=\"M").unwrap().1.split_once('"').unwrap().0;
            for point in curve.split('L') {
                let (x, y) = point.split_once(' ').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((LEFT..=WIDTH - RIGHT).contains(&x), "{point}");
                assert!((TOP..=HEIGHT - BOTTOM).contains(&y), "{point}");
            }
        }
    }

    #[test]
    fn times_have_the_unit_that_makes_them_short() {
        assert_eq!(
            [2, 3, 7, 9, 12].map(format_power),
            ["100 ns", "1 us", "10 ms", "1 s", "1000 s"]
        );
    }
}
