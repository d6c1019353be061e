//! A new library over the objects of an old version: the worker waits for ALTER EXTENSION UPDATE.
//!
//! Writers are not concerned: what they write is checked against the queue's shape.

use std::time::Duration;

use crate::postgres::{latch, spi, transaction};
use crate::shared::Database;

const LIBRARY: &str = env!("CARGO_PKG_VERSION");
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Returns once the extension's objects are those that this library is for; false if the extension is gone.
pub fn wait_until_objects_fit(database: &Database) -> bool {
    let mut complained = false;
    loop {
        match transaction::run(installed) {
            Ok(Some(version)) if series(&version) == series(LIBRARY) => return true,
            Ok(Some(version)) => {
                let trouble = format!(
                    "needs ALTER EXTENSION pg_es_sync UPDATE: version {version} is installed, the library is {LIBRARY}"
                );
                if !std::mem::replace(&mut complained, true) {
                    pgrx::warning!("es_sync {trouble}");
                }
                database.set_state(&trouble);
            }
            Ok(None) => {
                database.set_has_extension(false);
                return false;
            }
            Err(error) => pgrx::warning!("could not look for the extension: {error}"),
        }
        latch::wait_my_latch(LOOK_EVERY);
    }
}

fn installed() -> Option<String> {
    let rows = spi::run("select e.extversion from pg_catalog.pg_extension e where e.extname = 'pg_es_sync'", &[]);
    rows.first(1)
}

/// Major and minor version: objects do not change within.
fn series(version: &str) -> Vec<&str> {
    version.split('.').take(2).collect()
}
