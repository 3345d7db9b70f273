//! The metrics: what a scrape says, who serves it, and what a real Prometheus makes of it.

mod alerts;
mod brief;
mod dashboard;
mod documented;
mod listener;
mod prometheus;
mod scrape;
mod text;
