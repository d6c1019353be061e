//! The lease: whether this database is the one that may write to its indexes.
//!
//! It is taken, renewed and watched in the engine (`es::lease`), where every copy of the database would meet. This is
//! the state machine; what follows from its decisions in the database is written down by `succession`. It trusts no
//! two clocks to agree: a holder that does not renew for so long on the watcher's own clock is taken for gone, and a
//! holder stops sending well before that on its own.

use std::time::{Duration, Instant};

use es::{Failure, FailureKind, Found, Lease as Document, Mark, Output};

use super::engine::Engine;

/// Renewals within a time-out.
const BEATS: u32 = 5;

/// What the database remembers of its lease.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Note {
    /// Generation that it last took; 0 for none.
    pub generation: i64,
    /// As whom it took it.
    pub holder: String,
    /// Why it stays off: it met another one that writes.
    pub standing_off: Option<String>,
    /// An administrator wants it to write, whoever else does.
    pub take_over: bool,
    /// Why the queue takes nothing, or took nothing when a transaction wrote that may not have ended.
    pub queue_closed: Option<String>,
    /// The last version it used.
    pub version: i64,
}

/// What has been decided.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// This database writes. `gap`: why changes may have passed it by, None if nobody else can have written since.
    Taken { generation: i64, gap: Option<&'static str> },
    /// Another one writes, and this one is to stay off until an administrator decides otherwise.
    StandOff(String),
}

#[derive(Debug)]
enum State {
    /// The engine is to be asked.
    Unknown {
        due: Instant,
    },
    /// `known`: held until now, as far as is known; only its document's state is in doubt.
    Asking {
        call: u64,
        watch: Option<Watch>,
        known: Option<Held>,
    },
    /// Somebody else has it, and may be gone.
    Watching {
        watch: Watch,
        due: Instant,
    },
    Taking {
        call: u64,
        lease: Document,
        gap: Option<&'static str>,
    },
    Held(Held),
    Off,
}

#[derive(Debug, Clone)]
struct Watch {
    found: Found,
    since: Instant,
    changed: Option<Instant>,
}

#[derive(Debug, Clone)]
struct Held {
    lease: Document,
    mark: Mark,
    valid_until: Instant,
    renewing: Option<(u64, Instant)>,
    due: Instant,
}

/// One worker's view of the lease.
#[derive(Debug)]
pub struct Keeper {
    installation: String,
    holder: String,
    address: String,
    timeout: Duration,
    state: State,
    /// Generations up to this one were met in documents: the next one taken is higher.
    met: i64,
    failures: u32,
}

impl Keeper {
    pub fn new(installation: String, holder: String, address: String, timeout: Duration) -> Self {
        let state = State::Unknown { due: Instant::now() };
        Self { installation, holder, address, timeout, state, met: 0, failures: 0 }
    }

    pub fn installation(&self) -> &str {
        &self.installation
    }

    /// True while this database may send: it holds the lease and has renewed it in time.
    pub fn may_send(&self, now: Instant) -> bool {
        match &self.state {
            State::Held(held) | State::Asking { known: Some(held), .. } => now < held.valid_until,
            _ => false,
        }
    }

    /// What stands in the way of sending: a sentence; None if nothing does.
    pub fn obstacle(&self, now: Instant) -> Option<String> {
        match &self.state {
            _ if self.may_send(now) => None,
            State::Held(_) | State::Asking { known: Some(_), .. } => {
                Some("the lease could not be renewed in time: the engine does not answer".into())
            }
            State::Watching { watch, .. } | State::Asking { watch: Some(watch), .. } => Some(format!(
                "another server or database holds the lease ({}): waiting to see whether it is alive",
                watch.found.lease.address
            )),
            _ => Some("the lease in the engine is not yet taken".into()),
        }
    }

    /// True while somebody else's lease is being watched.
    pub fn is_watching(&self) -> bool {
        matches!(self.state, State::Watching { .. } | State::Asking { watch: Some(_), .. })
    }

    /// When the engine is asked again, after it did not answer; None while it does.
    pub fn next_try(&self) -> Option<Instant> {
        match &self.state {
            _ if self.failures == 0 => None,
            State::Unknown { due } | State::Watching { due, .. } => Some(*due),
            State::Held(held) => Some(held.due),
            _ => None,
        }
    }

    /// The document to leave behind at a clean stop, and the state that it goes over.
    pub fn parting(&self, version: i64, now: Instant) -> Option<(Document, Mark)> {
        match &self.state {
            State::Held(held) if held.renewing.is_none() && now < held.valid_until => {
                let lease = Document { beats: held.lease.beats + 1, version, released: true, ..held.lease.clone() };
                Some((lease, held.mark))
            }
            _ => None,
        }
    }

    /// Documents of a later generation were met: somebody else has written.
    pub fn met_generation(&mut self, generation: i64, now: Instant) {
        self.met = self.met.max(generation);
        if matches!(self.state, State::Held(_)) {
            // Asks at once, and is not trusted until the answer is there.
            self.state = State::Unknown { due: now };
        }
    }

    /// Does what is due; when to come again. `version`: the last one used.
    pub fn step(&mut self, engine: &mut Engine, note: &Note, version: i64, now: Instant) -> Option<Instant> {
        match &mut self.state {
            State::Off if note.take_over || note.standing_off.is_none() => {
                self.state = State::Unknown { due: now };
                Some(now)
            }
            State::Off => None,
            State::Unknown { due } if *due <= now => {
                if note.standing_off.is_some() && !note.take_over {
                    self.state = State::Off;
                    return None;
                }
                self.ask(engine, None, None);
                None
            }
            State::Unknown { due } => Some(*due),
            State::Watching { due, .. } if *due > now && !note.take_over => Some(*due),
            State::Watching { watch, .. } => {
                let watch = watch.clone();
                self.ask(engine, Some(watch), None);
                None
            }
            State::Held(held) if held.renewing.is_none() && held.due <= now => {
                let lease = Document { beats: held.lease.beats + 1, version, ..held.lease.clone() };
                let (installation, mark) = (self.installation.clone(), held.mark);
                let call = engine.call_urgent(move |client| {
                    let mark = client.write_lease(&installation, &lease, Some(mark))?;
                    Ok(Found { lease, mark })
                });
                held.renewing = Some((call, now));
                Some(held.valid_until)
            }
            State::Held(held) if held.renewing.is_none() => Some(held.due),
            State::Held(held) => (held.valid_until > now).then_some(held.valid_until),
            State::Asking { .. } | State::Taking { .. } => None,
        }
    }

    fn ask(&mut self, engine: &mut Engine, watch: Option<Watch>, known: Option<Held>) {
        let installation = self.installation.clone();
        let call = engine.call_urgent(move |client| client.lease(&installation));
        self.state = State::Asking { call, watch, known };
    }

    /// Takes the answer to one of its calls: None if it is not its own, then what it decides, if anything.
    pub fn answered(
        &mut self,
        token: u64,
        result: &Result<Output, Failure>,
        engine: &mut Engine,
        note: &Note,
        now: Instant,
    ) -> Option<Option<Verdict>> {
        let own = match &self.state {
            State::Asking { call, .. } | State::Taking { call, .. } => *call == token,
            State::Held(held) => held.renewing.is_some_and(|(call, _)| call == token),
            _ => false,
        };
        if !own {
            return None;
        }
        let state = std::mem::replace(&mut self.state, State::Off);
        if result.is_ok() {
            self.failures = 0;
        }
        Some(match (state, result) {
            (State::Held(held), Ok(output)) => {
                self.renewed(&held, output.get());
                None
            }
            // Somebody else wrote, or this very renewal came through although its answer was lost: look.
            (State::Held(held), Err(failure))
                if failure.kind == FailureKind::Conflict
                    || failure.kind == FailureKind::NotFound
                    || failure.kind.outcome_unknown() =>
            {
                self.ask(engine, None, Some(held));
                None
            }
            (State::Held(held) | State::Asking { known: Some(held), .. }, Err(_)) => {
                let due = self.later(now);
                self.state = State::Held(Held { renewing: None, due, ..held });
                None
            }
            (State::Asking { watch, known, .. }, Ok(output)) => {
                let found = output.get::<Option<Found>>().clone();
                match known {
                    Some(held) => self.looked(engine, note, held, found, now),
                    None => self.decide(engine, note, watch, found, now),
                }
            }
            (State::Asking { watch: Some(watch), .. }, Err(_)) => {
                // Silence counts only while the engine itself answers.
                let watch = Watch { changed: watch.changed.map(|_| now), since: now, ..watch };
                self.state = State::Watching { due: self.later(now), watch };
                None
            }
            (State::Taking { lease, gap, .. }, Ok(output)) => {
                let generation = lease.generation;
                self.state = self.held(lease, *output.get(), now);
                Some(Verdict::Taken { generation, gap })
            }
            (_, _) => {
                self.state = State::Unknown { due: self.later(now) };
                None
            }
        })
    }

    fn renewed(&mut self, held: &Held, found: &Found) {
        // From the start of the request: the engine's clock ran from somewhere behind that.
        if let Some((_, started)) = held.renewing {
            self.state = self.held(found.lease.clone(), found.mark, started);
        }
    }

    /// The document's state was in doubt while the lease was held.
    fn looked(
        &mut self,
        engine: &mut Engine,
        note: &Note,
        held: Held,
        found: Option<Found>,
        now: Instant,
    ) -> Option<Verdict> {
        match found {
            Some(found)
                if found.lease.holder == self.holder
                    && found.lease.generation == held.lease.generation
                    && found.lease.beats >= held.lease.beats =>
            {
                self.state =
                    State::Held(Held { lease: found.lease, mark: found.mark, renewing: None, due: now, ..held });
                None
            }
            Some(found) if found.lease.generation > held.lease.generation => {
                self.state = State::Off;
                Some(Verdict::StandOff(format!(
                    "{} has taken the lease over, generation {}",
                    found.lease.address, found.lease.generation
                )))
            }
            // Gone, or older than what was written: the engine was set back.
            found => {
                self.take(engine, note, found, Some("the engine was set back to an older state"));
                None
            }
        }
    }

    fn decide(
        &mut self,
        engine: &mut Engine,
        note: &Note,
        watch: Option<Watch>,
        found: Option<Found>,
        now: Instant,
    ) -> Option<Verdict> {
        let Some(found) = found else {
            let gap =
                (note.generation > 0).then_some("the engine does not know the lease: it was replaced or set back");
            self.take(engine, note, None, gap);
            return None;
        };
        let lease = &found.lease;
        if self.is_template_copy(note) && !note.take_over {
            self.state = State::Off;
            return Some(Verdict::StandOff(format!(
                "this database is a copy of another one of its server, which the lease belongs to ({})",
                lease.address
            )));
        }
        if note.take_over {
            self.take(engine, note, Some(found), Some("the lease was taken over by es_sync.take_over()"));
            return None;
        }
        if lease.holder == self.holder {
            // A former worker of this very server had it; the queue has seen everything since.
            let gap = if lease.generation < note.generation {
                Some("the engine was set back to an older state")
            } else if lease.generation > note.generation {
                // The answer was lost, or this server's worker died before it wrote down why it took it.
                Some("the lease was taken and the reason is not known any more")
            } else if lease.generation < self.met {
                Some("documents of a later generation were met")
            } else {
                None
            };
            self.take(engine, note, Some(found), gap);
            return None;
        }
        if lease.released {
            let known = lease.holder == note.holder && lease.generation == note.generation;
            let gap = if known && lease.version == note.version {
                None
            } else {
                Some("another server or database has written meanwhile")
            };
            self.take(engine, note, Some(found), gap);
            return None;
        }
        let mut watch = watch.unwrap_or(Watch { found: found.clone(), since: now, changed: None });
        if watch.found.mark != found.mark {
            watch.changed = Some(now);
        }
        watch.found = found;
        let silent = now.duration_since(watch.changed.unwrap_or(watch.since));
        if silent >= self.timeout {
            self.take(engine, note, Some(watch.found), Some("the former holder of the lease is gone"));
            return None;
        }
        if watch.changed.is_some() && now.duration_since(watch.since) >= 2 * self.timeout {
            self.state = State::Off;
            return Some(Verdict::StandOff(format!("{} holds the lease and is alive", watch.found.lease.address)));
        }
        self.state = State::Watching { watch, due: now + self.beat() };
        None
    }

    /// CREATE DATABASE ... TEMPLATE copies what the original remembers, its name as a holder included. Whether the
    /// original holds the lease just now says nothing: it lets go of it to be copied.
    fn is_template_copy(&self, note: &Note) -> bool {
        let database = |holder: &str| holder.rsplit_once('-').map(|(_, oid)| oid.to_owned());
        !note.holder.is_empty() && database(&note.holder) != database(&self.holder)
    }

    fn take(&mut self, engine: &mut Engine, note: &Note, found: Option<Found>, gap: Option<&'static str>) {
        let last = found.as_ref().map_or(0, |found| found.lease.generation);
        let lease = Document {
            generation: next_generation(last, note.generation, self.met, clock_generation()),
            holder: self.holder.clone(),
            address: self.address.clone(),
            beats: 0,
            version: note.version,
            released: false,
        };
        let (installation, written) = (self.installation.clone(), lease.clone());
        let call = engine
            .call_urgent(move |client| client.write_lease(&installation, &written, found.map(|found| found.mark)));
        self.state = State::Taking { call, lease, gap };
    }

    fn held(&self, lease: Document, mark: Mark, since: Instant) -> State {
        let (valid_until, due) = (since + self.trusted(), since + self.beat());
        State::Held(Held { lease, mark, valid_until, renewing: None, due })
    }

    fn beat(&self) -> Duration {
        self.timeout / BEATS
    }

    /// How long a holder trusts a renewal: well below what a watcher waits.
    fn trusted(&self) -> Duration {
        self.timeout * 2 / 3
    }

    /// After a failure: soon, for this is also what notices that the engine is back.
    fn later(&mut self, now: Instant) -> Instant {
        self.failures = self.failures.saturating_add(1);
        now + self.beat().min(Duration::from_millis(100) * self.failures.min(20))
    }
}

/// Higher than all that was ever seen: in the engine, in this database, in documents; and not behind the clock.
fn next_generation(in_engine: i64, noted: i64, met: i64, clock: i64) -> i64 {
    (in_engine.max(noted).max(met) + 1).max(clock)
}

/// Generations begin with the clock, in minutes since 2024, so that they grow even where everything was forgotten: an
/// extension dropped and created again, a dump restored.
fn clock_generation() -> i64 {
    const YEAR_2024: u64 = 1_704_067_200;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (now.as_secs().saturating_sub(YEAR_2024) / 60) as i64
}

#[cfg(test)]
mod tests {
    use super::next_generation;

    #[test]
    fn a_generation_is_higher_than_every_one_that_was_seen() {
        assert_eq!(next_generation(0, 0, 0, 100), 100, "the first begins with the clock");
        assert_eq!(next_generation(100, 100, 0, 100), 101, "two takings within a minute");
        assert_eq!(next_generation(500, 100, 0, 200), 501, "a backup restored a second time");
        assert_eq!(next_generation(100, 500, 0, 200), 501, "an engine that was set back");
        assert_eq!(next_generation(100, 100, 700, 200), 701, "documents of somebody else");
        assert_eq!(next_generation(100, 100, 0, 900), 900, "after years");
    }
}
