use super::*;
use crate::stub::{Reply, Stub, config, hanging_url};

const OK: &str = r#"{"errors":false,"items":[{"index":{"status":200}}]}"#;

fn delivery(token: u64) -> Delivery {
    let mut body = Body::new();
    body.index("1", None, 1, b"{}");
    Delivery { token, target: Target { alias: "a".into(), pipeline: None }, body }
}

fn start(url: &str) -> Senders {
    let client = Client::new(config(url)).unwrap();
    Senders::start(client.clone(), client).unwrap()
}

/// As the worker does: waits for the descriptor, clears it, takes what is there.
fn wait(senders: &Senders, count: usize) -> Vec<Event> {
    let mut events = Vec::new();
    while events.len() < count {
        let mut poll = libc::pollfd { fd: senders.wake_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry that lives across the call.
        let ready = unsafe { libc::poll(&mut poll, 1, 10_000) };
        assert_eq!(ready, 1, "{} of {count} events after 10 s", events.len());
        senders.clear_wake();
        events.extend(std::iter::from_fn(|| senders.next()));
    }
    events
}

#[test]
fn every_delivery_and_call_comes_back_once_with_its_token() {
    let stub = Stub::start(|_| Reply::Answer(200, OK));
    let senders = start(&stub.url);
    for token in 0..50 {
        senders.send(delivery(token));
        senders.call(token + 100, |client| client.call_json(crate::Method::Get, "/", None));
    }
    let mut tokens: Vec<u64> = wait(&senders, 100)
        .into_iter()
        .map(|event| match event {
            Event::Delivered { token, body, result, .. } => {
                assert_eq!((result, body.operations()), (Ok(vec![Outcome::Done]), 1));
                token
            }
            Event::Called { token, result } => {
                assert!(result.is_ok());
                token
            }
        })
        .collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..50).chain(100..150).collect::<Vec<_>>());
    assert!(senders.next().is_none());
    senders.stop(Duration::from_secs(5));
}

#[test]
fn a_panic_is_an_event_and_not_the_end() {
    let stub = Stub::start(|_| Reply::Answer(200, OK));
    let senders = start(&stub.url);
    senders.call(1, |_| -> Result<(), Failure> { panic!("for the test") });
    senders.call(2, |_| Ok(7));
    let events = wait(&senders, 2);
    match &events[0] {
        Event::Called { token: 1, result: Err(failure) } => {
            assert_eq!(failure.kind, FailureKind::BadAnswer);
            assert!(failure.reason.contains("for the test"));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(&events[1], Event::Called { token: 2, result: Ok(output) } if *output.get::<i32>() == 7));
    senders.stop(Duration::from_secs(5));
}

#[test]
fn no_signal_reaches_a_sender_thread() {
    let stub = Stub::start(|_| Reply::Answer(200, OK));
    let senders = start(&stub.url);
    senders.call(1, |_| {
        // SAFETY: reads the thread's mask into a set that we own.
        let blocked = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut set);
            [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1, libc::SIGALRM, libc::SIGCHLD]
                .iter()
                .all(|signal| libc::sigismember(&set, *signal) == 1)
        };
        Ok((blocked, thread::current().name().map(str::to_owned)))
    });
    match &wait(&senders, 1)[0] {
        Event::Called { result: Ok(output), .. } => {
            assert_eq!(*output.get::<(bool, Option<String>)>(), (true, Some("es_sync calls".into())));
        }
        other => panic!("{other:?}"),
    }
    // SAFETY: as above.
    let here = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut set);
        libc::sigismember(&set, libc::SIGTERM)
    };
    assert_eq!(here, 0, "the starter's own mask was not restored");
    senders.stop(Duration::from_secs(5));
}

#[test]
fn stopping_interrupts_what_is_in_flight() {
    let stub = Stub::start(|_| Reply::Silence);
    let senders = start(&stub.url);
    for token in 0..10 {
        senders.send(delivery(token));
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while stub.seen().len() < 2 {
        assert!(Instant::now() < deadline, "only {} requests arrived", stub.seen().len());
        thread::yield_now();
    }
    let events = senders.events.clone();
    let start = Instant::now();
    senders.stop(Duration::from_secs(5));
    assert!(start.elapsed() < Duration::from_secs(1), "it took {:?}", start.elapsed());
    let results: Vec<Event> = events.try_iter().collect();
    assert_eq!(results.len(), 10);
    for event in results {
        assert!(
            matches!(event, Event::Delivered { result: Err(Failure { kind: FailureKind::Shutdown, .. }), .. }),
            "{event:?}"
        );
    }
}

#[test]
fn stopping_does_not_wait_for_a_connect() {
    let (url, _listener, _held) = hanging_url();
    let mut config = config(&url);
    config.connect_timeout = Duration::from_secs(10);
    let senders = {
        let client = Client::new(config).unwrap();
        Senders::start(client.clone(), client).unwrap()
    };
    senders.send(delivery(1));
    let start = Instant::now();
    senders.stop(Duration::from_millis(100));
    assert!(start.elapsed() < Duration::from_secs(1), "it took {:?}", start.elapsed());
}
