//! The metrics: what a scrape says, who serves it, and what a real Prometheus makes of it.

mod documented;
mod listener;
mod scrape;
mod text;
