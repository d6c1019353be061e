//! The text of a report, printed while it grows; the figures that have a target; and medians.

use crate::chart;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

#[derive(Default)]
pub struct Report {
    text: String,
    /// Where in the text the summary is put in the end.
    summary_place: usize,
    figures: Vec<Figure>,
    /// Lines that follow the summary.
    remarks: Vec<String>,
}

/// A ratio, or another number, that has a target.
pub struct Figure {
    pub section: &'static str,
    pub name: String,
    pub value: f64,
    pub target: Target,
}

#[derive(Clone, Copy)]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Figure {
    pub fn is_reached(&self) -> bool {
        match self.target {
            Target::AtLeast(bound) => self.value >= bound,
            Target::AtMost(bound) => self.value <= bound,
        }
    }
}

impl Target {
    pub fn bound(self) -> f64 {
        match self {
            Target::AtLeast(bound) | Target::AtMost(bound) => bound,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::AtLeast(bound) => write!(f, "at least {bound:.2}"),
            Target::AtMost(bound) => write!(f, "at most {bound:.2}"),
        }
    }
}

impl Report {
    pub fn new() -> Report {
        Report::default()
    }

    /// The summary of all figures will stand at this place of the text.
    pub fn summary_goes_here(&mut self) {
        self.summary_place = self.text.len();
    }

    /// Adds a figure to the summary and the chart.
    pub fn figure(&mut self, section: &'static str, name: impl Into<String>, value: f64, target: Target) {
        self.figures.push(Figure { section, name: name.into(), value, target });
    }

    /// Adds a line below the summary.
    pub fn remark(&mut self, text: String) {
        self.remarks.push(text);
    }

    /// Every figure that has a target, as a table, and what there is to say of them all.
    pub fn summary(&self) -> String {
        let mut rows = vec![row(["", "", "measured", "target", "reached"])];
        let mut last = "";
        for figure in &self.figures {
            let section = if figure.section == last { "" } else { figure.section };
            last = figure.section;
            let reached = if figure.is_reached() { "yes" } else { "no" };
            let value = format!("{:.2}", figure.value);
            rows.push(row([section, &figure.name, &value, &figure.target.to_string(), reached]));
        }
        let remarks: String = self.remarks.iter().map(|remark| format!("\n{remark}\n")).collect();
        format!("## Summary\n\n{}{remarks}", layout(&rows))
    }

    /// Adds a line, and prints it.
    pub fn line(&mut self, text: &str) {
        println!("{text}");
        let _ = writeln!(self.text, "{text}");
    }

    /// Adds a table. The first row is its head.
    pub fn table(&mut self, rows: &[Vec<String>]) {
        self.line(&layout(rows));
    }

    /// Writes the report, and the chart that it shows if it has one. `file` has no ending.
    pub fn write(&self, file: &Path, has_chart: bool) {
        let (head, sections) = self.text.split_at(self.summary_place);
        let mut summary = self.summary();
        if has_chart {
            let chart = file.with_extension("svg");
            let name = chart.file_name().unwrap_or_default().to_string_lossy();
            let _ = write!(summary, "\n![Each figure beside its target]({name})\n");
            std::fs::write(&chart, chart::svg(&self.figures)).expect("could not write the chart");
        }
        let text = format!("{head}{summary}\n{}\n", sections.trim_end());
        std::fs::write(file.with_extension("md"), text).expect("could not write the report");
    }
}

/// A table, its columns padded so that it reads well as plain text too.
fn layout(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
        if number == 0 {
            let rules: Vec<String> = widths.iter().map(|width| "-".repeat((*width).max(3))).collect();
            let _ = writeln!(text, "| {} |", rules.join(" | "));
        }
    }
    text
}

/// One row of a table.
pub fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// What was measured again and again.
#[derive(Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    pub fn add_time(&mut self, time: Duration) {
        self.add(time.as_secs_f64());
    }

    pub fn extend(&mut self, other: Samples) {
        self.0.extend(other.0);
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// As Postgres' percentile_cont: between two samples, what lies between them.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let place = share * (sorted.len() - 1) as f64;
        let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
        below + (above - below) * place.fract()
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The standard error of the median of a normal distribution with the samples' deviation, as a share of the median.
    fn error_of_median(&self) -> f64 {
        let count = self.0.len() as f64;
        let mean = self.0.iter().sum::<f64>() / count;
        let variance = self.0.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
        1.25 * (variance / count).sqrt() / self.median()
    }

    /// Lowest and highest.
    pub fn range(&self, decimals: usize) -> String {
        format!("{:.decimals$} to {:.decimals$}", self.quantile(0.0), self.quantile(1.0))
    }

    /// Between which half of them lie.
    pub fn middle_half(&self, decimals: usize) -> String {
        format!("{:.decimals$} to {:.decimals$}", self.quantile(0.25), self.quantile(0.75))
    }

    /// Each sample turned into something else.
    pub fn map(&self, turn: impl Fn(f64) -> f64) -> Samples {
        Samples(self.0.iter().map(|value| turn(*value)).collect())
    }

    /// Each sample divided by that of the same round, which ran next to it.
    pub fn over(&self, base: &Samples) -> Samples {
        Samples(self.0.iter().zip(&base.0).map(|(value, base)| value / base).collect())
    }
}

/// How many turns a comparison takes: as many as it needs, because a machine may be uneven, within limits.
#[derive(Clone, Copy)]
pub struct Turns {
    pub least: usize,
    pub most: usize,
}

impl Turns {
    /// Up to which standard error a median counts as known.
    const ERROR: f64 = 0.04;

    /// Whether these ratios, each with a value a turn, need another one. It looks at how they scatter, never at what they
    /// come to: stopping at a welcome value would make it one.
    pub fn go_on(self, ratios: &[Samples]) -> bool {
        let done = ratios.iter().map(Samples::count).min().unwrap_or(0);
        done < self.least || done < self.most && ratios.iter().any(|ratio| ratio.error_of_median() > Turns::ERROR)
    }
}

impl std::fmt::Display for Turns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.most > self.least {
            true => write!(f, "{} to {}", self.least, self.most),
            false => write!(f, "{}", self.least),
        }
    }
}

/// 12345.6 as "12,346".
pub fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
