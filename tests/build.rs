//! Finds out what the Postgres under test has, so that a test that needs some of it shows as ignored where it is missing,
//! and not as passed.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(postgis)");
    println!("cargo::rustc-check-cfg=cfg(virtual_columns)");
    println!("cargo::rerun-if-env-changed=PG_ES_SYNC_PG_BIN");
    let Ok(programs) = std::env::var("PG_ES_SYNC_PG_BIN") else { return };
    let config = |option: &str| -> Option<String> {
        let answer = Command::new(Path::new(&programs).join("pg_config")).arg(option).output().ok()?;
        Some(String::from_utf8_lossy(&answer.stdout).trim().to_owned())
    };
    // "PostgreSQL 18.1 (Debian ...)"
    let version = config("--version").and_then(|version| {
        version.split(|letter: char| !letter.is_ascii_digit()).find(|part| !part.is_empty())?.parse::<u32>().ok()
    });
    if version.is_some_and(|version| version >= 18) {
        println!("cargo::rustc-cfg=virtual_columns");
    }
    let Some(shared) = config("--sharedir") else { return };
    let control = Path::new(&shared).join("extension/postgis.control");
    println!("cargo::rerun-if-changed={}", control.display());
    if control.exists() {
        println!("cargo::rustc-cfg=postgis");
    }
}
