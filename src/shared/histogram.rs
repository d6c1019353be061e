//! How long changes took, as counts that any process may read.

use std::sync::atomic::{AtomicU64, Ordering};

/// Latencies in microseconds, sixteen buckets to a power of two, up to six days. Within a bucket a quantile is
/// interpolated, so that it errs by a sixteenth at most, and as a rule by far less.
#[repr(C)]
pub struct Histogram {
    buckets: [AtomicU64; Histogram::BUCKETS],
}

impl Histogram {
    const STEPS: usize = 16;
    pub(super) const BUCKETS: usize = 36 * Histogram::STEPS;

    pub(super) fn reset(&self) {
        for bucket in &self.buckets {
            bucket.store(0, Ordering::Relaxed);
        }
    }

    /// Counts `count` changes that took so long.
    pub fn record(&self, micros: u64, count: u64) {
        self.buckets[Self::bucket(micros)].fetch_add(count, Ordering::Relaxed);
    }

    /// The latency, in microseconds, that a share `quantile` (0 to 1) of all changes kept to; None without any.
    pub fn quantile(&self, quantile: f64) -> Option<u64> {
        Self::quantile_of(&self.counts(), quantile)
    }

    pub(super) fn counts(&self) -> Vec<u64> {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect()
    }

    pub(super) fn quantile_of(counts: &[u64], quantile: f64) -> Option<u64> {
        let total: u64 = counts.iter().sum();
        let wanted = ((total as f64 * quantile).ceil() as u64).max(1);
        let mut seen = 0;
        let bucket = counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        let (first, last) = (Self::lower_bound(bucket), Self::lower_bound(bucket + 1) - 1);
        let share = (wanted + counts[bucket] - seen) as f64 / counts[bucket] as f64;
        Some(first + ((last - first) as f64 * share) as u64)
    }

    fn bucket(micros: u64) -> usize {
        let steps = Self::STEPS as u64;
        let shift = micros.checked_ilog2().unwrap_or(0).saturating_sub(steps.ilog2());
        // The steps of a power of two are numbered from 16 to 31: its highest bit stands in for the power's own.
        (shift as usize * Self::STEPS + (micros >> shift) as usize).min(Self::BUCKETS - 1)
    }

    fn lower_bound(bucket: usize) -> u64 {
        if bucket < Self::STEPS {
            return bucket as u64;
        }
        let shift = bucket / Self::STEPS - 1;
        ((Self::STEPS + bucket % Self::STEPS) as u64) << shift
    }
}

#[cfg(test)]
mod tests {
    use super::Histogram;

    #[test]
    fn a_latency_falls_into_the_bucket_whose_bounds_hold_it() {
        for micros in (0..64).chain([100, 999, 1_000, 65_535, 65_536, 1_000_000, 86_400_000_000]) {
            let bucket = Histogram::bucket(micros);
            assert!(Histogram::lower_bound(bucket) <= micros, "{micros}");
            assert!(Histogram::lower_bound(bucket + 1) > micros, "{micros}");
        }
        assert_eq!(Histogram::bucket(u64::MAX), Histogram::BUCKETS - 1);
    }

    #[test]
    fn a_quantile_is_read_within_a_sixteenth() {
        let mut counts = vec![0; Histogram::BUCKETS];
        (1..=10_000).for_each(|micros| counts[Histogram::bucket(micros)] += 1);
        for (quantile, exact) in [(0.0001, 1.0), (0.5, 5_000.0), (0.99, 9_900.0), (0.999, 9_990.0), (1.0, 10_000.0)] {
            let read = Histogram::quantile_of(&counts, quantile).expect("there are latencies") as f64;
            assert!((read - exact).abs() <= exact / 16.0, "{quantile}: {read}");
        }
        assert_eq!(Histogram::quantile_of(&[0; Histogram::BUCKETS], 0.5), None);
    }
}
