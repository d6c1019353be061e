//! How many bytes a body holds and how many requests go out at once: as much as the engine takes, found by trying.

use std::time::Duration;

/// Bytes added to the target by each success that used it.
const BYTES_STEP: usize = 256 * 1024;
/// Smaller bodies than this are not made for the sake of balance.
const SMALL_BYTES: usize = 512 * 1024;
/// Full-sized successes after which one more request may go out at once.
const SUCCESSES_PER_STEP: u32 = 8;

/// Additive increase, multiplicative decrease, of bytes per body and of concurrency.
#[derive(Clone, Debug)]
pub struct Sizing {
    min_bytes: usize,
    /// Lowered by [`Sizing::on_too_large`]: what the engine, or a proxy before it, takes at all.
    max_bytes: usize,
    max_concurrency: usize,
    /// A body that takes longer is too big: others wait behind it.
    slow: Duration,
    target_bytes: usize,
    concurrency: usize,
    successes: u32,
}

impl Sizing {
    /// Starts at `max_bytes` and `max_concurrency`: what the user set is meant. `slow`: how long a body may take before
    /// the next ones get smaller.
    pub fn new(max_bytes: usize, max_concurrency: usize, slow: Duration) -> Sizing {
        let max_bytes = max_bytes.max(1);
        let max_concurrency = max_concurrency.max(1);
        Sizing {
            min_bytes: max_bytes.min(64 * 1024),
            max_bytes,
            max_concurrency,
            slow,
            target_bytes: max_bytes,
            concurrency: max_concurrency,
            successes: 0,
        }
    }

    /// Bytes to fill a body with. A single document may be larger.
    pub fn target_bytes(&self) -> usize {
        self.target_bytes
    }

    /// Requests at once.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// How many documents of `average` bytes the next body should have, with so many requests `in_flight` and so many
    /// documents `left`, if that is known: as many as fill it. Fewer while the engine has little to do, so that it has
    /// something soon, and fewer towards the end, so that no connection is left alone with the last large body.
    pub fn documents(&self, average: usize, in_flight: usize, left: Option<usize>) -> usize {
        let average = average.max(1);
        let early = SMALL_BYTES << in_flight.min(8);
        let late =
            left.map_or(usize::MAX, |left| (left.saturating_mul(average) / (2 * self.concurrency)).max(SMALL_BYTES));
        (self.target_bytes.min(early).min(late) / average).max(1)
    }

    /// A body of `bytes` was taken in `took`.
    pub fn on_success(&mut self, bytes: usize, took: Duration) {
        if took > self.slow {
            self.shrink_to(self.target_bytes / 4 * 3);
            return;
        }
        // A small body that went well says nothing about large ones.
        if bytes < self.target_bytes / 2 {
            return;
        }
        self.target_bytes = self.target_bytes.saturating_add(BYTES_STEP).min(self.max_bytes);
        self.successes += 1;
        if self.successes >= SUCCESSES_PER_STEP {
            self.successes = 0;
            self.concurrency = (self.concurrency + 1).min(self.max_concurrency);
        }
    }

    /// 429, for a whole request or some of its items: both are halved.
    pub fn on_too_many(&mut self) {
        self.shrink_to(self.target_bytes / 2);
        self.concurrency = (self.concurrency / 2).max(1);
        self.successes = 0;
    }

    /// 413 for a body of `bytes`: so much is never tried again.
    pub fn on_too_large(&mut self, bytes: usize) {
        self.max_bytes = self.max_bytes.min(bytes / 2).max(self.min_bytes);
        self.shrink_to(self.max_bytes.min(self.target_bytes));
    }

    fn shrink_to(&mut self, bytes: usize) {
        self.target_bytes = bytes.max(self.min_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: usize = 1024 * 1024;
    const QUICK: Duration = Duration::from_millis(50);

    fn sizing() -> Sizing {
        Sizing::new(8 * MB, 4, Duration::from_secs(5))
    }

    #[test]
    fn a_busy_engine_gets_less_and_then_more_again() {
        let mut sizing = sizing();
        sizing.on_too_many();
        assert_eq!((sizing.target_bytes(), sizing.concurrency()), (4 * MB, 2));
        for _ in 0..20 {
            sizing.on_too_many();
        }
        assert_eq!((sizing.target_bytes(), sizing.concurrency()), (64 * 1024, 1), "it never stops altogether");
        for _ in 0..100 {
            sizing.on_success(sizing.target_bytes(), QUICK);
        }
        assert_eq!((sizing.target_bytes(), sizing.concurrency()), (8 * MB, 4));
    }

    #[test]
    fn bodies_are_small_at_the_beginning_and_at_the_end() {
        let sizing = sizing();
        assert_eq!(sizing.documents(1024, 0, None), 512);
        assert_eq!(sizing.documents(1024, 2, None), 2048);
        assert_eq!(sizing.documents(1024, 4, None), 8192);
        assert_eq!(sizing.documents(1024, 4, Some(16_384)), 2048);
        assert_eq!(sizing.documents(1024, 4, Some(1)), 512);
        assert_eq!(sizing.documents(10 * MB, 0, None), 1, "a document may be larger than a body");
        assert_eq!(sizing.documents(0, 4, None), 8 * MB);
    }

    #[test]
    fn small_bodies_prove_nothing() {
        let mut sizing = sizing();
        sizing.on_too_many();
        for _ in 0..100 {
            sizing.on_success(1000, QUICK);
        }
        assert_eq!((sizing.target_bytes(), sizing.concurrency()), (4 * MB, 2));
    }

    #[test]
    fn what_was_too_large_is_not_tried_again() {
        let mut sizing = sizing();
        sizing.on_too_large(6 * MB);
        for _ in 0..100 {
            sizing.on_success(sizing.target_bytes(), QUICK);
        }
        assert_eq!(sizing.target_bytes(), 3 * MB);
    }

    #[test]
    fn slow_bodies_get_smaller() {
        let mut sizing = sizing();
        sizing.on_success(8 * MB, Duration::from_secs(6));
        assert_eq!((sizing.target_bytes(), sizing.concurrency()), (6 * MB, 4));
    }
}
