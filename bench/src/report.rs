//! The text of docs/benchmarks.md, printed while it grows; and medians.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

pub struct Report(String);

impl Report {
    pub fn new() -> Report {
        Report(String::new())
    }

    /// Adds a line, and prints it.
    pub fn line(&mut self, text: &str) {
        println!("{text}");
        let _ = writeln!(self.0, "{text}");
    }

    /// Adds a table, its columns padded so that it reads well as plain text too. The first row is its head.
    pub fn table(&mut self, rows: &[Vec<String>]) {
        let columns = rows.first().map_or(0, Vec::len);
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (number, row) in rows.iter().enumerate() {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            self.line(&format!("| {} |", cells.join(" | ")));
            if number == 0 {
                let rules: Vec<String> = widths.iter().map(|width| "-".repeat((*width).max(3))).collect();
                self.line(&format!("| {} |", rules.join(" | ")));
            }
        }
        self.line("");
    }

    pub fn write(&self, path: &Path) {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).expect("could not make the folder of the report");
        }
        std::fs::write(path, format!("{}\n", self.0.trim_end())).expect("could not write the report");
    }
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

    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let place = (share * (sorted.len() - 1) as f64).round() as usize;
        sorted[place]
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Lowest and highest.
    pub fn range(&self, decimals: usize) -> String {
        format!("{:.decimals$} to {:.decimals$}", self.quantile(0.0), self.quantile(1.0))
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
