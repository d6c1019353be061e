//! The chart of docs/benchmarks.md: every figure beside its target.

use crate::report::{Figure, Target};
use std::fmt::Write;

const WIDTH: usize = 820;
const ROW: usize = 20;
/// Where the bars begin, and how long one is that just meets its target.
const BARS: usize = 320;
const TARGET: f64 = 220.0;
/// Longer ones are cut.
const LONGEST: f64 = 320.0;

/// An SVG of bars, each scaled by its target, so that one line marks all targets. Readable on light and dark.
pub fn svg(figures: &[Figure]) -> String {
    let mut rows = String::new();
    let mut y = 50;
    let mut section = "";
    for figure in figures {
        if figure.section != section {
            section = figure.section;
            y += ROW * 3 / 2;
            let _ = writeln!(rows, r#"<text class="head" x="0" y="{}">{}</text>"#, y - 8, escaped(section));
        }
        let length = (figure.value / figure.target.bound() * TARGET).clamp(1.0, LONGEST);
        let class = if figure.is_reached() { "reached" } else { "missed" };
        let sign = match figure.target {
            Target::AtLeast(_) => '≥',
            Target::AtMost(_) => '≤',
        };
        let label = format!("{:.2} (target {sign} {:.2})", figure.value, figure.target.bound());
        let (name, middle) = (escaped(&figure.name), y + 14);
        let _ = writeln!(rows, r#"<text x="{}" y="{middle}" text-anchor="end">{name}</text>"#, BARS - 8);
        let _ = writeln!(rows, r#"<rect class="{class}" x="{BARS}" y="{}" width="{length:.0}" height="14"/>"#, y + 3);
        let _ = writeln!(rows, r#"<text x="{}" y="{middle}">{label}</text>"#, BARS + LONGEST as usize + 8);
        y += ROW;
    }
    let line = BARS + TARGET as usize;
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">
<style>
text {{ font: 12px sans-serif; fill: #1f2328; }}
.head {{ font-weight: bold; }}
.reached {{ fill: #2f81c7; }}
.missed {{ fill: #d4781c; }}
line {{ stroke: #1f2328; stroke-dasharray: 4 3; }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3; }} line {{ stroke: #e6edf3; }} }}
</style>
<text class="head" x="0" y="16">Each ratio beside its target (the line)</text>
<rect class="reached" x="0" y="28" width="12" height="12"/><text x="18" y="38">reached</text>
<rect class="missed" x="90" y="28" width="12" height="12"/><text x="108" y="38">not reached</text>
{rows}<line x1="{line}" x2="{line}" y1="50" y2="{y}"/>
</svg>
"#,
        height = y + 10
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
