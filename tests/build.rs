//! Finds out which extensions the Postgres under test has, so that a test that needs one of them shows as ignored where
//! it is missing, and not as passed.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(postgis)");
    println!("cargo::rerun-if-env-changed=PG_ES_SYNC_PG_BIN");
    let Ok(programs) = std::env::var("PG_ES_SYNC_PG_BIN") else { return };
    let Ok(answer) = Command::new(Path::new(&programs).join("pg_config")).arg("--sharedir").output() else { return };
    let control = Path::new(String::from_utf8_lossy(&answer.stdout).trim()).join("extension/postgis.control");
    println!("cargo::rerun-if-changed={}", control.display());
    if control.exists() {
        println!("cargo::rustc-cfg=postgis");
    }
}
