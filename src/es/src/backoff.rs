//! How long to wait before the next try.

use std::time::Duration;

/// Exponential backoff with full jitter: a delay drawn evenly from zero up to a bound that doubles with each try.
/// Full jitter, because many workers lose one engine at the same moment and would all come back together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Bound of the first delay.
    pub base: Duration,
    /// No bound grows beyond it.
    pub max: Duration,
}

impl Backoff {
    /// The delay after `attempt` failures, counted from 0.
    pub fn delay(&self, attempt: u32, rng: &mut fastrand::Rng) -> Duration {
        let bound = self.base.saturating_mul(1 << attempt.min(30)).min(self.max);
        bound.mul_f64(rng.f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff { base: Duration::from_millis(100), max: Duration::from_secs(10) };

    #[test]
    fn delays_spread_from_zero_to_a_doubling_bound() {
        let mut rng = fastrand::Rng::with_seed(1);
        for (attempt, bound) in [(0, 100), (1, 200), (5, 3200), (7, 10_000), (31, 10_000), (u32::MAX, 10_000)] {
            let delays: Vec<u128> = (0..1000).map(|_| BACKOFF.delay(attempt, &mut rng).as_millis()).collect();
            assert!(delays.iter().all(|delay| *delay <= bound), "attempt {attempt}");
            assert!(delays.iter().any(|delay| *delay < bound / 5), "attempt {attempt}: no low delay");
            assert!(delays.iter().any(|delay| *delay > bound * 4 / 5), "attempt {attempt}: no high delay");
        }
    }
}
