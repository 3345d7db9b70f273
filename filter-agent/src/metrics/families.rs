//! Families of metrics in the types of the `prometheus` crate, which writes their text format.

use anyhow::{Context as _, Result};
use prometheus::{
    TextEncoder,
    proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType},
};

/// Labels and value of one series.
pub(super) type Series<'a> = (Vec<(&'static str, &'a str)>, f64);

#[derive(Default)]
pub(super) struct Families(Vec<MetricFamily>);

impl Families {
    pub(super) fn gauge<'a>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = Series<'a>>,
    ) {
        self.add(name, help, MetricType::GAUGE, series);
    }

    pub(super) fn counter<'a>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = Series<'a>>,
    ) {
        self.add(name, help, MetricType::COUNTER, series);
    }

    /// A gauge without labels. `None`: unknown, or there is none, and no series is written.
    pub(super) fn value(&mut self, name: &str, help: &str, value: impl Into<Option<f64>>) {
        let series = value.into().map(|value| (Vec::new(), value));
        self.gauge(name, help, series);
    }

    fn add<'a>(
        &mut self,
        name: &str,
        help: &str,
        of_type: MetricType,
        series: impl IntoIterator<Item = Series<'a>>,
    ) {
        let metric = |(labels, value): Series<'a>| {
            let labels = labels.into_iter().map(|(name, value)| {
                let mut pair = LabelPair::default();
                pair.set_name(name.to_owned());
                pair.set_value(value.to_owned());
                pair
            });
            let mut metric = Metric::from_label(labels.collect());
            if of_type == MetricType::COUNTER {
                let mut counter = Counter::default();
                counter.set_value(value);
                metric.set_counter(counter);
            } else {
                let mut gauge = Gauge::default();
                gauge.set_value(value);
                metric.set_gauge(gauge);
            }
            metric
        };
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(of_type);
        family.set_metric(series.into_iter().map(metric).collect());
        self.extend(vec![family]);
    }

    /// Adds families. One without series has no place in the text.
    pub(super) fn extend(&mut self, families: Vec<MetricFamily>) {
        let families = families.into_iter();
        let families = families.filter(|family| !family.get_metric().is_empty());
        self.0.extend(families);
    }

    pub(super) fn text(&self) -> Result<String> {
        let text = TextEncoder::new().encode_to_string(&self.0);
        text.context("write the metrics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_families_without_series_are_left_out() {
        let mut families = Families::default();
        families.value("unknown", "Nobody knows.", None);
        let series = (vec![("interface", "a\"b\\c\nd")], 1.0);
        families.gauge("attached", "Whether it is.", [series]);
        families.counter("seen_total", "How many.", [(Vec::new(), 3.0)]);
        let expected = "# HELP attached Whether it is.
# TYPE attached gauge
attached{interface=\"a\\\"b\\\\c\\nd\"} 1
# HELP seen_total How many.
# TYPE seen_total counter
seen_total 3
";
        assert_eq!(families.text().unwrap(), expected);
    }
}
