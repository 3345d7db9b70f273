//! A line for people who wait.

use std::{
    io::{self, IsTerminal as _, Write as _},
    pin::pin,
    sync::Once,
    time::Duration,
};

const AFTER: Duration = Duration::from_secs(1);

/// Awaits a future. Where that takes longer than a second, tells on stderr what is waited for, once a command, and on a
/// terminal only.
pub(super) async fn announced<T>(what: impl Fn() -> String, future: impl Future<Output = T>) -> T {
    static TOLD: Once = Once::new();
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
