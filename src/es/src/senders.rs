//! The threads that send, and how the worker hears from them.
//!
//! Threads touch owned data only, and no signal is delivered to them: a handler of the server's running in one would
//! work on the main thread's state.

use std::any::Any;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::answer::Outcome;
use crate::body::Body;
use crate::bulk::Target;
use crate::client::Client;
use crate::failure::{Failure, FailureKind};

/// A body on its way. `token` comes back with its result.
#[derive(Debug)]
pub struct Delivery {
    pub token: u64,
    pub target: Target,
    pub body: Body,
}

/// What a thread has finished.
#[derive(Debug)]
pub enum Event {
    Delivered {
        token: u64,
        /// Given back, to be split, or cleared and used again.
        body: Body,
        result: Result<Vec<Outcome>, Failure>,
        took: Duration,
    },
    Called {
        token: u64,
        result: Result<Output, Failure>,
    },
}

/// What a call's function gave, of whatever type: who made the call knows it.
#[derive(Debug)]
pub struct Output(Box<dyn Any + Send>);

impl Output {
    /// # Panics
    /// If the function gave something of another type: somebody has taken the answer to another call for his.
    pub fn get<T: 'static>(&self) -> &T {
        self.0.downcast_ref().expect("whoever takes an answer has made the call")
    }
}

type CallFunction = dyn FnOnce(&Client) -> Result<Output, Failure> + Send;

struct Call {
    token: u64,
    function: Box<CallFunction>,
}

impl Call {
    fn new<T: Send + 'static>(
        token: u64,
        function: impl FnOnce(&Client) -> Result<T, Failure> + Send + 'static,
    ) -> Self {
        Self { token, function: Box::new(move |client| Ok(Output(Box::new(function(client)?)))) }
    }
}

/// `connections` threads for bodies, one for calls, which are carried out one after the other, and one for calls that
/// must not wait for those.
#[derive(Debug)]
pub struct Senders {
    client: Client,
    urgent_client: Client,
    deliveries: Sender<Delivery>,
    calls: Sender<Call>,
    urgent: Sender<Call>,
    events: Receiver<Event>,
    /// Readable when there are events; the threads hold the other end.
    wake: UnixStream,
    /// Disconnected when the last thread has ended.
    ended: Receiver<()>,
    threads: Vec<JoinHandle<()>>,
}

impl Senders {
    /// Starts the threads. `urgent` is the client of urgent calls, with a time limit of its own. Errors: no socket pair
    /// or no thread to be had.
    pub fn start(client: Client, urgent: Client) -> io::Result<Senders> {
        let (deliveries, delivery_queue) = unbounded::<Delivery>();
        let (calls, call_queue) = unbounded::<Call>();
        let (urgent_calls, urgent_queue) = unbounded::<Call>();
        let (event_sender, events) = unbounded();
        let (wake, wake_sender) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        wake_sender.set_nonblocking(true)?;
        let outbox = Outbox { events: event_sender, wake: Arc::new(wake_sender) };
        let (alive, ended) = unbounded::<()>();
        let count = client.config().connections.max(1);
        let masked = SignalMask::block_all();
        let mut threads = Vec::with_capacity(count + 2);
        // Should a spawn fail, the threads before end as the channels are dropped.
        for (name, client, queue) in [("calls", &client, call_queue), ("urgent calls", &urgent, urgent_queue)] {
            let (client, outbox, alive) = (client.clone(), outbox.clone(), alive.clone());
            threads.push(thread::Builder::new().name(format!("es_sync {name}")).spawn(move || {
                let _alive = alive;
                queue.iter().for_each(|call| outbox.put(run_call(&client, call)));
            })?);
        }
        for number in 1..=count {
            let (client, outbox, alive) = (client.clone(), outbox.clone(), alive.clone());
            let queue = delivery_queue.clone();
            threads.push(thread::Builder::new().name(format!("es_sync sender {number}")).spawn(move || {
                let _alive = alive;
                queue.iter().for_each(|delivery| outbox.put(deliver(&client, delivery)));
            })?);
        }
        drop(masked);
        Ok(Senders {
            client,
            urgent_client: urgent,
            deliveries,
            calls,
            urgent: urgent_calls,
            events,
            wake,
            ended,
            threads,
        })
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Readable when there is an event, until [`Senders::clear_wake`]. To be waited on, not read.
    pub fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Makes the descriptor unreadable. Take events until there is none *after* this, or one may be left lying.
    pub fn clear_wake(&self) {
        let mut buffer = [0; 256];
        while matches!((&self.wake).read(&mut buffer), Ok(read) if read > 0) {}
    }

    /// Hands a body to the threads. Never blocks: the caller bounds what is in flight.
    pub fn send(&self, delivery: Delivery) {
        // Fails only when no thread is left, and they end no sooner than this is dropped.
        let _ = self.deliveries.send(delivery);
    }

    /// Runs a function with the client in the calls' thread, in the order they are given. Its result comes as [`Event::Called`].
    pub fn call<T: Send + 'static>(
        &self,
        token: u64,
        function: impl FnOnce(&Client) -> Result<T, Failure> + Send + 'static,
    ) {
        // As above.
        let _ = self.calls.send(Call::new(token, function));
    }

    /// As [`Senders::call`], in the thread for what must not wait: with the urgent client.
    pub fn call_urgent<T: Send + 'static>(
        &self,
        token: u64,
        function: impl FnOnce(&Client) -> Result<T, Failure> + Send + 'static,
    ) {
        // As above.
        let _ = self.urgent.send(Call::new(token, function));
    }

    /// The next event, if there is one. Never blocks.
    pub fn next(&self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// Shuts the client down and waits for the threads, at most `grace`. One that is stuck in a TCP connect or in name
    /// resolution is left behind: it owns all that it touches.
    pub fn stop(self, grace: Duration) {
        let deadline = Instant::now() + grace;
        self.client.shutdown();
        self.urgent_client.shutdown();
        drop((self.deliveries, self.calls, self.urgent));
        // Nothing is ever sent: this returns when the last thread drops its end, or at the deadline.
        let _ = self.ended.recv_deadline(deadline);
        for thread in self.threads {
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}

/// Does one piece of work in a thread whose signals are masked, and waits for it so long at the most; None if it took
/// longer or no thread was to be had. For a last word at a process's end.
pub fn run_apart<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let masked = SignalMask::block_all();
    let spawned = thread::Builder::new().name("es_sync last word".into()).spawn(move || {
        // Fails when nobody waits any more.
        let _ = sender.send(work());
    });
    drop(masked);
    spawned.ok()?;
    receiver.recv_timeout(limit).ok()
}

#[derive(Clone)]
struct Outbox {
    events: Sender<Event>,
    wake: Arc<UnixStream>,
}

impl Outbox {
    /// The event first, the wake-up behind it. Both fail when nobody listens any more; a full socket has woken already.
    fn put(&self, event: Event) {
        let _ = self.events.send(event);
        let _ = (&*self.wake).write(&[1]);
    }
}

fn deliver(client: &Client, delivery: Delivery) -> Event {
    let Delivery { token, target, body } = delivery;
    let start = Instant::now();
    let result =
        catch_unwind(AssertUnwindSafe(|| client.bulk(&target, &body))).unwrap_or_else(|panic| Err(panicked(&*panic)));
    Event::Delivered { token, body, result, took: start.elapsed() }
}

fn run_call(client: &Client, call: Call) -> Event {
    let Call { token, function } = call;
    let result = catch_unwind(AssertUnwindSafe(|| function(client))).unwrap_or_else(|panic| Err(panicked(&*panic)));
    Event::Called { token, result }
}

fn panicked(panic: &(dyn Any + Send)) -> Failure {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Failure::new(FailureKind::BadAnswer, format!("a sender thread panicked: {text}"))
}

/// Blocks every signal for this thread, and so for those it spawns, until dropped.
struct SignalMask(libc::sigset_t);

impl SignalMask {
    fn block_all() -> SignalMask {
        // SAFETY: both sets are plain data that we own; sigfillset and pthread_sigmask only write to them.
        // SIG_SETMASK with a full set cannot fail.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            SignalMask(before)
        }
    }
}

impl Drop for SignalMask {
    fn drop(&mut self) {
        // SAFETY: the set was filled in by pthread_sigmask in block_all.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut());
        }
    }
}

#[cfg(test)]
#[path = "senders_tests.rs"]
mod tests;
