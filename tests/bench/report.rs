//! What was measured: as a table, as JSON, as a picture, and against the goals.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};
use plotters::prelude::*;
use serde::Serialize;

use crate::spread::{Spread, quantile};

/// Something measured several times.
#[derive(Clone, Serialize)]
pub struct Measure {
    pub section: &'static str,
    pub name: String,
    /// What stood in front of TCP; the filter where nothing else is said.
    pub host: Option<&'static str>,
    pub prefixes: Option<usize>,
    pub unit: &'static str,
    pub value: Spread,
    /// Where not only the middle counts.
    pub tail: Option<Tail>,
    /// Of what a program that only drops or passes reached in the same round, or no filter. Where some packets pass, of one
    /// that drops and passes as many of them.
    pub share: Option<Spread>,
    /// The shape of the list, where it is not the hard one.
    pub list: Option<&'static str>,
    /// The part of the packets that pass, where it is a part.
    pub passed: Option<f64>,
    /// Of the program, executed for one such packet, without what helpers of the kernel execute.
    pub instructions: Option<u64>,
}

/// The 99th percentile, and the highest value.
#[derive(Clone, Copy, Serialize)]
pub struct Tail {
    pub p99: f64,
    pub max: f64,
}

impl Measure {
    pub fn new(
        section: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        values: &[f64],
    ) -> Self {
        Self {
            section,
            name: name.into(),
            host: None,
            prefixes: None,
            unit,
            value: Spread::of(values),
            tail: None,
            share: None,
            list: None,
            passed: None,
            instructions: None,
        }
    }

    /// One of which the rare high values count.
    pub fn with_tail(section: &'static str, name: impl Into<String>, values: &[f64]) -> Self {
        let tail = Tail {
            p99: quantile(values, 0.99),
            max: quantile(values, 1.0),
        };
        Self {
            tail: Some(tail),
            ..Self::new(section, name, "ms", values)
        }
    }

    pub fn on(self, host: &'static str) -> Self {
        let host = Some(host);
        Self { host, ..self }
    }

    pub fn with_prefixes(self, prefixes: usize) -> Self {
        let prefixes = Some(prefixes);
        Self { prefixes, ..self }
    }

    pub fn with_list(self, list: Option<&'static str>) -> Self {
        Self { list, ..self }
    }

    pub fn with_passed(self, passed: Option<f64>) -> Self {
        Self { passed, ..self }
    }

    pub fn with_instructions(self, instructions: u64) -> Self {
        let instructions = Some(instructions);
        Self {
            instructions,
            ..self
        }
    }

    pub fn with_shares(self, shares: &[f64]) -> Self {
        let share = Some(Spread::of(shares));
        Self { share, ..self }
    }
}

/// What the project promises of its speed, and what came out.
#[derive(Serialize)]
pub struct Goal {
    pub goal: String,
    pub measured: f64,
    pub met: bool,
}

#[derive(Default, Serialize)]
pub struct Report {
    /// Kernel and processor.
    pub machine: String,
    pub measures: Vec<Measure>,
    pub goals: Vec<Goal>,
    /// What could not be measured, and why.
    pub missing: Vec<String>,
}

impl Report {
    pub fn record(&mut self, measure: Measure) {
        let Measure { section, name, .. } = &measure;
        let of = measure
            .prefixes
            .map(|prefixes| format!(", {prefixes} prefixes"));
        let list = measure.list.map(|list| format!(", {list}"));
        let on = measure.host.map(|host| format!(", {host}"));
        let tail = measure
            .tail
            .map(|tail| format!("; p99 {:.1}, at most {:.1}", tail.p99, tail.max));
        let instructions = measure
            .instructions
            .map(|instructions| format!("; {instructions} instructions without helpers"));
        println!(
            "{section}: {name}{}{}{}: {} {}{}{}",
            of.unwrap_or_default(),
            list.unwrap_or_default(),
            on.unwrap_or_default(),
            measure.value,
            measure.unit,
            tail.unwrap_or_default(),
            instructions.unwrap_or_default()
        );
        self.measures.push(measure);
    }

    pub fn miss(&mut self, what: String) {
        println!("not measured: {what}");
        self.missing.push(what);
    }

    /// The measures of a section whose names begin so.
    pub fn find(&self, section: &str, name: &str) -> impl Iterator<Item = &Measure> {
        let measures = self.measures.iter();
        measures.filter(move |m| m.section == section && m.name.starts_with(name))
    }

    /// A goal that no measured value may exceed, or, with `at_least`, fall short of.
    pub fn judge(&mut self, goal: impl Into<String>, bound: f64, at_least: bool, values: &[f64]) {
        let worst = if at_least { f64::min } else { f64::max };
        let Some(measured) = values.iter().copied().reduce(worst) else {
            return;
        };
        let met = if at_least {
            measured >= bound
        } else {
            measured <= bound
        };
        self.goals.push(Goal {
            goal: goal.into(),
            measured,
            met,
        });
    }

    pub fn print(&self) {
        println!("\n{}", self.machine);
        let mut sections: Vec<&str> = self.measures.iter().map(|m| m.section).collect();
        sections.dedup();
        for section in sections {
            println!("\n{section}");
            let mut table = Table::new();
            table.load_style(presets::NOTHING);
            table.set_header([
                "",
                "prefixes",
                "list",
                "in front",
                "median (quartiles)",
                "",
                "share",
                "passed",
                "p99",
                "at most",
                "instructions without helpers",
            ]);
            for m in self.measures.iter().filter(|m| m.section == section) {
                let tail = |of: fn(Tail) -> f64| {
                    m.tail
                        .map_or(String::new(), |tail| format!("{:.1}", of(tail)))
                };
                let passed = m.passed.map(|passed| format!("{:.1} %", 100.0 * passed));
                let share = m.share.map(|share| format!("{:.2}", share.median));
                table.add_row([
                    m.name.clone(),
                    m.prefixes.map(|n| n.to_string()).unwrap_or_default(),
                    m.list.unwrap_or_default().to_owned(),
                    m.host.unwrap_or_default().to_owned(),
                    m.value.to_string(),
                    m.unit.to_owned(),
                    share.unwrap_or_default(),
                    passed.unwrap_or_default(),
                    tail(|tail| tail.p99),
                    tail(|tail| tail.max),
                    m.instructions.map(|n| n.to_string()).unwrap_or_default(),
                ]);
            }
            println!("{}", table.trim_fmt());
        }
        for missing in &self.missing {
            println!("not measured: {missing}");
        }
        println!("\ngoals, each by its worst case");
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        for Goal {
            goal,
            measured,
            met,
        } in &self.goals
        {
            let verdict = if *met { "met" } else { "MISSED" };
            table.add_row([goal.clone(), format!("{measured:.2}"), verdict.into()]);
        }
        println!("{}", table.trim_fmt());
    }

    pub fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        let json = serde_json::to_string_pretty(self)?;
        fs::write(directory.join("bench.json"), json)?;
        let picture = directory.join("bench.svg");
        self.draw(&picture).context("draw the picture")
    }

    /// Live rates of dropped packets from one source and from random ones, by the number of prefixes.
    fn draw(&self, file: &Path) -> Result<()> {
        const COLOURS: [RGBColor; 5] = [
            RGBColor(0, 90, 181),
            RGBColor(220, 50, 32),
            RGBColor(204, 121, 167),
            RGBColor(213, 140, 0),
            RGBColor(90, 90, 90),
        ];
        let area = SVGBackend::new(file, (900, 420)).into_drawing_area();
        area.fill(&WHITE)?;
        let halves = area.split_evenly((1, 2));
        let cases = ["one source, denied, IPv4", "random sources, IPv4"];
        let titles = [
            "One source that is not allowed",
            "Every packet from another source",
        ];
        for ((half, case), title) in halves.iter().zip(cases).zip(titles) {
            let measures = self.find("live", case).filter(|m| m.list.is_none());
            let measures: Vec<&Measure> = measures.collect();
            let sizes = measures.iter().filter_map(|m| m.prefixes);
            let (Some(least), Some(most)) = (sizes.clone().min(), sizes.max()) else {
                continue;
            };
            let range = (least as f64 * 0.8..most as f64 * 1.25).log_scale();
            let mut chart = ChartBuilder::on(half)
                .caption(title, ("sans-serif", 17))
                .margin(8)
                .margin_right(24)
                .x_label_area_size(40)
                .y_label_area_size(50)
                .build_cartesian_2d(range, 0.0..1.1)?;
            chart
                .configure_mesh()
                .x_desc("allowed prefixes")
                .y_desc("dropped per second, share of what a program without a filter does")
                .x_label_formatter(&|x| format!("{x:.0}"))
                .light_line_style(WHITE)
                .draw()?;
            let mut hosts: Vec<&str> = Vec::new();
            for host in measures.iter().filter_map(|m| m.host) {
                if !host.starts_with("XDP_DROP") && !hosts.contains(&host) {
                    hosts.push(host);
                }
            }
            for (host, colour) in hosts.into_iter().zip(COLOURS) {
                let of_host = measures.iter().filter(|m| m.host == Some(host));
                let points = of_host.filter_map(|m| Some((m.prefixes? as f64, m.share?.median)));
                let points: Vec<(f64, f64)> = points.collect();
                let style = colour.stroke_width(2);
                chart
                    .draw_series(LineSeries::new(points.iter().copied(), style).point_size(3))?
                    .label(host)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
            }
            // On the right it would hide lines.
            if case == cases[0] {
                chart
                    .configure_series_labels()
                    .position(SeriesLabelPosition::MiddleRight)
                    .background_style(WHITE.mix(0.8))
                    .draw()?;
            }
        }
        area.present()?;
        Ok(())
    }
}
