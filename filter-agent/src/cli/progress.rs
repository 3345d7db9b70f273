//! A line for people who wait.

use std::{
    io::{self, IsTerminal as _, Write as _},
    pin::pin,
    sync::Once,
    time::Duration,
};

const AFTER: Duration = Duration::from_secs(1);

static TOLD: Once = Once::new();

/// Tells nothing from now on: this process draws on the terminal.
pub(super) fn be_silent() {
    TOLD.call_once(|| {});
}

/// Awaits a future. Where that takes longer than a second, tells on stderr what is waited for, once a command, and on a
/// terminal only.
pub(super) async fn announced<T>(what: impl Fn() -> String, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    if io::stderr().is_terminal() {
        if let Ok(done) = tokio::time::timeout(AFTER, &mut future).await {
            return done;
        }
        TOLD.call_once(|| {
            // A terminal that is gone needs no line.
            let _ = writeln!(io::stderr(), "{}", what());
        });
    }
    future.await
}
