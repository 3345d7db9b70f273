//! Starts the agent so that the test can let its system calls fail: see `injector`.

use std::{convert::Infallible, env};

use anyhow::Result;
use filter_tests::injector::launch;

fn main() -> Result<Infallible> {
    launch(env::args_os().skip(1))
}
