//! Waiting for a condition. Tests never sleep for a time and hope.

use std::fmt::Debug;
use std::time::{Duration, Instant};

/// For what happens within a second in life, and on a busy machine may not.
pub const SHORT: Duration = Duration::from_secs(20);
/// For what takes a lease's time-out, a restart or a load.
pub const LONG: Duration = Duration::from_secs(90);

/// What a probe may return: `Some(value)`, `true` or `Ok(value)` end the wait; what stands in `Err` is shown if it never
/// does.
pub trait Probe {
    type Value;
    fn settle(self) -> Result<Self::Value, Option<String>>;
}

impl<T> Probe for Option<T> {
    type Value = T;
    fn settle(self) -> Result<T, Option<String>> {
        self.ok_or(None)
    }
}

impl Probe for bool {
    type Value = ();
    fn settle(self) -> Result<(), Option<String>> {
        if self { Ok(()) } else { Err(None) }
    }
}

impl<T, E: Debug> Probe for Result<T, E> {
    type Value = T;
    fn settle(self) -> Result<T, Option<String>> {
        self.map_err(|last| Some(format!("{last:?}")))
    }
}

/// Probes until it holds. Panics after `deadline` with what was awaited and the last value seen.
#[track_caller]
pub fn until<P: Probe>(what: &str, deadline: Duration, mut probe: impl FnMut() -> P) -> P::Value {
    let start = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        match probe().settle() {
            Ok(value) => return value,
            Err(last) if start.elapsed() >= deadline => panic!(
                "waited {:.1} s in vain until {what}; last seen: {}",
                start.elapsed().as_secs_f64(),
                last.as_deref().unwrap_or("nothing")
            ),
            Err(_) => {}
        }
        std::thread::sleep(pause);
        pause = (pause * 3 / 2).min(Duration::from_millis(100));
    }
}

/// Probes until the value is the expected one.
#[track_caller]
pub fn until_equal<T: PartialEq + Debug>(what: &str, deadline: Duration, expected: T, mut probe: impl FnMut() -> T) {
    until(what, deadline, || {
        let seen = probe();
        if seen == expected { Ok(()) } else { Err(seen) }
    });
}
