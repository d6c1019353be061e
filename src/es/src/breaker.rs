//! Whether to send at all: stops asking an engine that does not answer, and finds out when it does again.

use std::time::{Duration, Instant};

use crate::backoff::Backoff;

/// Opens after a failure; then lets single probes through, at delays that grow with full jitter.
/// Counts failures of whole requests, not of documents. Time comes from the caller.
#[derive(Clone, Debug)]
pub struct Breaker {
    backoff: Backoff,
    rng: fastrand::Rng,
    state: State,
    /// In a row.
    failures: u32,
    probes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Closed,
    /// No request before `until`.
    Open {
        until: Instant,
    },
    /// A probe is out. Should its result never be told, another may go at `until`.
    HalfOpen {
        until: Instant,
    },
}

/// What may be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    Normal,
    /// One small request; tell its result by [`Breaker::success`] or [`Breaker::failure`].
    Probe,
    /// Nothing, and no use in asking before this.
    No(Instant),
}

impl Breaker {
    pub fn new(backoff: Backoff) -> Breaker {
        Breaker { backoff, rng: fastrand::Rng::new(), state: State::Closed, failures: 0, probes: 0 }
    }

    pub fn allow(&mut self, now: Instant) -> Permit {
        match self.state {
            State::Closed => Permit::Normal,
            State::Open { until } | State::HalfOpen { until } if now < until => Permit::No(until),
            State::Open { .. } | State::HalfOpen { .. } => {
                self.state = State::HalfOpen { until: now + LOST_PROBE };
                Permit::Probe
            }
        }
    }

    /// A whole request got through. Closes, even when it was one sent before the breaker opened: the engine answers.
    pub fn success(&mut self) {
        self.state = State::Closed;
        self.failures = 0;
        self.probes = 0;
    }

    /// A whole request failed for a passing reason ([`FailureKind::is_transient`](crate::FailureKind::is_transient)).
    pub fn failure(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        match self.state {
            State::Closed => self.open(now),
            State::HalfOpen { .. } => {
                self.probes = self.probes.saturating_add(1);
                self.open(now);
            }
            // A request from before it opened: says nothing new, must not push the probe away.
            State::Open { .. } => {}
        }
    }

    fn open(&mut self, now: Instant) {
        self.state = State::Open { until: now + self.backoff.delay(self.probes, &mut self.rng) };
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

/// A probe unheard of for so long counts as lost. Longer than any sensible request_timeout: a second probe beside a slow
/// one would do no harm, only no good.
const LOST_PROBE: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(8);

    fn breaker() -> Breaker {
        Breaker::new(Backoff { base: Duration::from_secs(1), max: MAX })
    }

    fn until(permit: Permit) -> Instant {
        match permit {
            Permit::No(until) => until,
            other => panic!("not open: {other:?}"),
        }
    }

    /// The moment from which the open breaker lets a probe through.
    fn wait_for_probe(breaker: &mut Breaker) -> Instant {
        let State::Open { until } = breaker.state() else { panic!("not open: {breaker:?}") };
        assert_eq!(breaker.allow(until), Permit::Probe);
        until
    }

    #[test]
    fn a_failure_opens_it_and_a_success_closes_it() {
        let now = Instant::now();
        let mut breaker = breaker();
        assert_eq!(breaker.allow(now), Permit::Normal);
        breaker.failure(now);
        assert!(matches!(breaker.state(), State::Open { .. }));
        breaker.success();
        assert_eq!(breaker.allow(now), Permit::Normal);
    }

    #[test]
    fn one_probe_at_a_time_goes_out_while_the_engine_is_away() {
        let mut breaker = breaker();
        let start = Instant::now();
        breaker.failure(start);
        let mut now = start;
        for _ in 0..50 {
            let probed = wait_for_probe(&mut breaker);
            assert!(probed - now <= MAX, "the delay outgrew its bound");
            now = probed;
            assert!(until(breaker.allow(now)) > now, "a second probe beside the first");
            breaker.failure(now);
        }
        wait_for_probe(&mut breaker);
        breaker.success();
        assert_eq!((breaker.allow(now), breaker.failures()), (Permit::Normal, 0));
    }

    #[test]
    fn late_failures_do_not_push_the_probe_away() {
        let mut breaker = breaker();
        let now = Instant::now();
        breaker.failure(now);
        let State::Open { until } = breaker.state() else { panic!() };
        breaker.failure(now + MAX);
        assert_eq!(breaker.state(), State::Open { until });
    }

    #[test]
    fn a_probe_that_got_lost_does_not_block_for_ever() {
        let mut breaker = breaker();
        breaker.failure(Instant::now());
        let probed = wait_for_probe(&mut breaker);
        assert_eq!(breaker.allow(probed + LOST_PROBE), Permit::Probe);
    }
}
