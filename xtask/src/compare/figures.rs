//! Which figures of two benchmarks differ, from several rounds of both.

use comfy_table::{Table, presets};
use serde::Deserialize;
use spread::Spread;

#[path = "../../../tests/bench/spread.rs"]
mod spread;

/// The figures that a run of the benchmark writes. Those that are not compared are left out.
#[derive(Deserialize)]
pub struct Written {
    measures: Vec<Measure>,
}

/// Fields that an earlier benchmark does not write are those that say nothing.
#[derive(Deserialize)]
struct Measure {
    section: String,
    name: String,
    prefixes: Option<usize>,
    list: Option<String>,
    host: Option<String>,
    unit: String,
    value: Median,
    share: Option<Median>,
}

#[derive(Deserialize)]
struct Median {
    median: f64,
}

#[derive(Clone, Copy)]
pub enum Side {
    Base,
    This,
}

/// The figures of all rounds, in the order in which they were first measured.
pub struct Comparison {
    rounds: usize,
    figures: Vec<Figure>,
}

struct Figure {
    name: String,
    unit: String,
    /// One for each round, at each side.
    values: [Vec<f64>; 2],
}

impl Comparison {
    pub fn new(rounds: usize) -> Self {
        let figures = Vec::new();
        Self { rounds, figures }
    }

    /// The figures of a side's next round.
    pub fn add(&mut self, side: Side, written: Written) {
        for measure in written.measures {
            let prefixes = measure
                .prefixes
                .map(|prefixes| format!("{prefixes} prefixes"));
            let parts = [Some(measure.name), prefixes, measure.list, measure.host];
            let parts: Vec<String> = parts.into_iter().flatten().collect();
            let name = format!("{}: {}", measure.section, parts.join(", "));
            if let Some(share) = measure.share {
                self.add_value(side, name.clone(), "share".into(), share.median);
            }
            self.add_value(side, name, measure.unit, measure.value.median);
        }
    }

    fn add_value(&mut self, side: Side, name: String, unit: String, value: f64) {
        let mut figures = self.figures.iter();
        let place = figures.position(|figure| figure.name == name && figure.unit == unit);
        let place = place.unwrap_or_else(|| {
            let values = Default::default();
            self.figures.push(Figure { name, unit, values });
            self.figures.len() - 1
        });
        self.figures[place].values[side as usize].push(value);
    }

    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "",
            "base (quartiles)",
            "this (quartiles)",
            "",
            "this/base",
            "",
        ]);
        for figure in &self.figures {
            let [base, this] = figure
                .values
                .each_ref()
                .map(|values| match values.as_slice() {
                    [] => "none".to_owned(),
                    values => Spread::of(values).to_string(),
                });
            let ratio = figure.ratio(self.rounds);
            table.add_row([
                figure.name.clone(),
                base,
                this,
                figure.unit.clone(),
                ratio.map_or(String::new(), |ratio| format!("{ratio:.3}")),
                figure.verdict(self.rounds).to_owned(),
            ]);
        }
        table
    }
}

impl Figure {
    fn is_whole(&self, rounds: usize) -> bool {
        self.values.iter().all(|values| values.len() == rounds)
    }

    /// This over base in each round. Differences from a floor may be nothing or less: no ratio says anything then.
    fn ratio(&self, rounds: usize) -> Option<Spread> {
        let [base, this] = &self.values;
        let is_positive = [base, this].into_iter().flatten().all(|value| *value > 0.0);
        let ratios = base.iter().zip(this).map(|(base, this)| this / base);
        (self.is_whole(rounds) && is_positive).then(|| Spread::of(&ratios.collect::<Vec<_>>()))
    }

    /// That the quartiles of the ratios lie on one side of 1 would not do: by chance alone, those of five rounds do so for
    /// more than one figure in three. All runs of one side beyond all of the other: for one in 126.
    fn verdict(&self, rounds: usize) -> &'static str {
        let [base, this] = &self.values;
        match (base.is_empty(), this.is_empty()) {
            (true, _) => return "not in base",
            (_, true) => return "only in base",
            _ if !self.is_whole(rounds) => return "not in every round",
            _ => {}
        }
        let are_below = |some: &[f64], others: &[f64]| {
            some.iter()
                .all(|value| others.iter().all(|other| value < other))
        };
        let is_more = match (are_below(base, this), are_below(this, base)) {
            (false, false) => return "no difference",
            (is_more, _) => is_more,
        };
        let is_time = matches!(self.unit.as_str(), "ns" | "ms");
        let is_rate =
            self.unit.ends_with("/s") || matches!(self.unit.as_str(), "share" | "times one");
        match (is_more, is_time || is_rate) {
            (_, true) if is_more == is_rate => "faster",
            (_, true) => "slower",
            (true, false) => "more",
            (false, false) => "less",
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn figure(unit: &str, base: &[f64], this: &[f64]) -> Figure {
        Figure {
            name: "agent: reload".into(),
            unit: unit.into(),
            values: [base.to_vec(), this.to_vec()],
        }
    }

    fn written(measures: serde_json::Value) -> Written {
        serde_json::from_value(json!({"machine": "any", "measures": measures})).unwrap()
    }

    const LOW: [f64; 4] = [9.0, 9.5, 8.0, 9.9];
    const HIGH: [f64; 4] = [10.0, 11.0, 30.0, 10.1];

    #[test]
    fn a_side_is_faster_by_less_time_or_a_higher_rate() {
        for (unit, low_after_high, high_after_low) in [
            ("ns", "faster", "slower"),
            ("ms", "faster", "slower"),
            ("million packets/s", "slower", "faster"),
            ("share", "slower", "faster"),
            ("times one", "slower", "faster"),
            ("MB", "less", "more"),
            ("% of one", "less", "more"),
        ] {
            assert_eq!(figure(unit, &HIGH, &LOW).verdict(4), low_after_high);
            assert_eq!(figure(unit, &LOW, &HIGH).verdict(4), high_after_low);
        }
    }

    #[test]
    fn one_run_among_those_of_the_other_side_makes_no_difference() {
        let mixed = [10.0, 11.0, 9.9, 10.1];
        assert_eq!(figure("ns", &LOW, &mixed).verdict(4), "no difference");
        assert_eq!(figure("ns", &mixed, &LOW).verdict(4), "no difference");
        assert_eq!(
            figure("MB", &[8.0; 4], &[8.0; 4]).verdict(4),
            "no difference"
        );
    }

    #[test]
    fn ratios_are_those_of_each_round() {
        // The machine was three times slower in the second round.
        let figure = figure(
            "ns",
            &[10.0, 30.0, 10.0, 10.0, 20.0],
            &[11.0, 33.0, 12.0, 9.0, 22.0],
        );
        let ratio = figure.ratio(5).unwrap();
        assert_eq!(format!("{ratio:.3}"), "1.100 (1.100 to 1.100)");
    }

    #[test]
    fn nothing_is_divided_by_what_may_be_nothing() {
        let figure = figure("ns", &[0.1, -0.2, 0.0, 0.3], &[2.0, 2.1, 2.2, 1.9]);
        assert!(figure.ratio(4).is_none());
        assert_eq!(figure.verdict(4), "slower");
    }

    #[test]
    fn figures_are_paired_by_all_that_names_them() {
        let value = json!({"median": 2.0, "low": 1.0, "high": 3.0});
        let share = json!({"median": 0.5, "low": 0.5, "high": 0.5});
        let of_list = |list: &str| {
            json!({"section": "live", "name": "random", "list": list, "host": "nft", "prefixes": 30,
                   "unit": "million packets/s", "value": value, "share": share})
        };
        // An earlier benchmark, which knows neither lists nor shares.
        let plain = json!({"section": "live", "name": "random", "host": "nft", "prefixes": 30,
                           "unit": "million packets/s", "value": value});
        let mut comparison = Comparison::new(2);
        comparison.add(Side::Base, written(json!([plain])));
        comparison.add(Side::This, written(json!([of_list("cloud"), plain])));
        comparison.add(Side::This, written(json!([of_list("country"), plain])));
        comparison.add(
            Side::Base,
            written(
                json!([plain, {"section": "agent", "name": "start", "unit": "ms", "value": value}]),
            ),
        );
        let found = comparison.figures.iter();
        let found: Vec<_> = found
            .map(|it| (it.name.as_str(), it.unit.as_str(), it.verdict(2)))
            .collect();
        let rate = "million packets/s";
        let expected = [
            ("live: random, 30 prefixes, nft", rate, "no difference"),
            (
                "live: random, 30 prefixes, cloud, nft",
                "share",
                "not in base",
            ),
            ("live: random, 30 prefixes, cloud, nft", rate, "not in base"),
            (
                "live: random, 30 prefixes, country, nft",
                "share",
                "not in base",
            ),
            (
                "live: random, 30 prefixes, country, nft",
                rate,
                "not in base",
            ),
            ("agent: start", "ms", "only in base"),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_figure_of_some_rounds_is_not_judged() {
        let figure = figure("ns", &LOW[..3], &HIGH);
        assert_eq!(figure.verdict(4), "not in every round");
        assert!(figure.ratio(4).is_none());
    }
}
