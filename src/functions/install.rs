//! Called by the extension's script.

use pgrx::prelude::*;

use crate::capture;

/// Fails where the library was not preloaded; otherwise tells the launcher, once CREATE EXTENSION has committed.
#[pg_extern(sql = false)]
fn require_preload() {
    super::require_preload();
    capture::announce_extension_change();
}
