//! The harness of the end-to-end tests. tests/README.md shows how to write one.
//!
//! | module | what it is |
//! | --- | --- |
//! | `server` | a Postgres of one's own, which may be stopped, crashed and copied |
//! | `engine` | Elasticsearch or OpenSearch, shared or one's own |
//! | `proxy`  | stands between worker and engine and injects faults |
//! | `expect` | compares every document with what SQL says |
//! | `named`  | statements about a test's own table |
//! | `wait`   | waits for a condition, with a deadline |
//! | `shop`   | a table with documents from a view, and a few statements on it |
//! | `process`| how servers are started, and end with the test |
//!
//! Runs only through scripts/test.sh, which provides Postgres and the engines and cleans up after all.

pub mod engine;
pub mod expect;
pub mod named;
pub mod process;
pub mod proxy;
pub mod server;
pub mod shop;
pub mod wait;

pub use engine::Engine;
pub use proxy::{Fault, Proxy};
pub use server::{Mode, Server};

use postgres::Client;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// A name that no other test uses. The shared engines keep every test's indexes, so that a table whose name becomes an
/// index's must not be called "orders" in two tests at once.
pub fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{name}_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Raises a flag when it goes out of scope: for threads that go on until somebody says so, also if the test fails.
pub struct Raise<'a>(pub &'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Fills the queue with rows for keys 1 to 1000 of a table, each as a small transaction would: some 60 bytes.
#[track_caller]
pub fn fill_queue(client: &mut Client, table: &str, rows: u32) {
    // As src/queue/keys.rs writes a text: what follows, its length, its bytes.
    let fill = format!(
        "insert into es_sync.queue
         select i, '{table}'::regclass, 1, now(), convert_to(chr(2) || chr(length(k)) || k, 'UTF8')
         from generate_series(1, {rows}) i, lateral (select (i % 1000 + 1)::text as k) k"
    );
    client.batch_execute(&fill).expect("could not fill the queue");
}

/// Lets the engine be away until a queue as `Builder::with_small_queue` makes it takes nothing more.
#[track_caller]
pub fn close_queue(client: &mut Client, proxy: &Proxy, table: &str) {
    proxy.set(Fault::Refuse);
    fill_queue(client, table, 20_000);
    wait::until("the queue is closed", wait::SHORT, || is_stale(client));
}

/// Waits until the server has noticed the crash of one of its processes: it ends all the others.
#[track_caller]
pub fn crashed(mut client: Client) {
    wait::until("the server has noticed the crash", wait::SHORT, || client.batch_execute("select").is_err());
}

/// Whether the only index there is waits to be compared with its table.
#[track_caller]
pub fn is_stale(client: &mut Client) -> bool {
    client.query_one("select stale is not null from es_sync.status", &[]).expect("could not read the status").get(0)
}
