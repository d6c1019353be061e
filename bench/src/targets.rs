//! What was to be reached, and whether it was: the table at the end of a section.

use crate::report::{Report, row};

pub struct Targets(Vec<Vec<String>>);

impl Targets {
    pub fn new() -> Targets {
        Targets(vec![row(["figure", "measured", "target", "reached"])])
    }

    pub fn at_least(&mut self, figure: &str, value: f64, least: f64, unit: &str) {
        self.add(figure, value, "at least", least, unit, value >= least);
    }

    pub fn at_most(&mut self, figure: &str, value: f64, most: f64, unit: &str) {
        self.add(figure, value, "at most", most, unit, value <= most);
    }

    /// The unit, such as "x" or " MB", follows both numbers.
    fn add(&mut self, figure: &str, value: f64, side: &str, bound: f64, unit: &str, reached: bool) {
        let reached = if reached { "yes" } else { "**no**" };
        self.0.push(row([figure, &format!("{value:.2}{unit}"), &format!("{side} {bound}{unit}"), reached]));
    }

    pub fn print(self, report: &mut Report) {
        report.table(&self.0);
    }
}
