//! Which databases are kept without connections for a moment.

use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Statements that can keep workers out of a database at the same time.
const MAX_HOLDS: usize = 64;

/// Databases that must stay without a worker for a moment, and the processes that want it so: the OID in the high half
/// of a place, the process id in the low one; 0 for a free place.
#[repr(C)]
pub struct Holds {
    places: [AtomicU64; MAX_HOLDS],
}

impl Holds {
    /// Keeps workers out of `database` until `release`, or the end of process `owner`. False if there is no place left.
    pub fn take(&self, database: u32, owner: i32, is_alive: impl Fn(i32) -> bool) -> bool {
        let hold = u64::from(database) << 32 | u64::from(owner as u32);
        let taken = self.places.iter().any(|place| {
            let old = place.load(Ordering::Acquire);
            (old == 0 || !is_alive(old as u32 as i32))
                && place.compare_exchange(old, hold, Ordering::AcqRel, Ordering::Acquire).is_ok()
        });
        // Paired with the one in `set_worker`: either the owner sees the worker, or the worker sees the hold.
        fence(Ordering::SeqCst);
        taken
    }

    /// Gives back what process `owner` has taken.
    pub fn release(&self, owner: i32) {
        for place in &self.places {
            if place.load(Ordering::Acquire) as u32 == owner as u32 {
                place.store(0, Ordering::Release);
            }
        }
    }

    /// True while a process that is alive keeps workers out of `database`.
    pub fn is_held(&self, database: u32, is_alive: impl Fn(i32) -> bool) -> bool {
        self.places.iter().any(|place| {
            let hold = place.load(Ordering::Acquire);
            (hold >> 32) as u32 == database && hold != 0 && is_alive(hold as u32 as i32)
        })
    }
}
