use super::*;
use crate::body::Body;
use crate::bulk::Target;
use crate::stub::{Folder, Reply, Stub, config, hanging_url, refusing_url};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use std::sync::Mutex;
use std::thread;

const OK: &str = r#"{"errors":false,"items":[{"index":{"status":200}}]}"#;

fn client(urls: &str) -> Client {
    Client::new(config(urls)).unwrap()
}

fn bulk(client: &Client) -> Result<Vec<crate::Outcome>, Failure> {
    let mut body = Body::new();
    body.index("1", None, 1, b"{}");
    client.bulk(&Target { alias: "a".into(), pipeline: None }, &body)
}

fn kind<T: fmt::Debug>(result: Result<T, Failure>) -> FailureKind {
    result.unwrap_err().kind
}

#[test]
fn a_bulk_request_names_the_write_alias_and_keeps_its_connection() {
    let stub = Stub::start(|_| Reply::Answer(200, OK));
    let client = client(&stub.url);
    let mut body = Body::new();
    body.index("1", None, 1, b"{}");
    for pipeline in [None, Some("p q".to_string())] {
        client.bulk(&Target { alias: "größe".into(), pipeline }, &body).unwrap();
    }
    let seen = stub.seen();
    assert!(
        seen[0].line.starts_with("POST /gr%C3%B6%C3%9Fe/_bulk?require_alias=true&timeout=2000ms&filter_path="),
        "{}",
        seen[0].line
    );
    assert!(seen[1].line.ends_with("&pipeline=p%20q"));
    assert_eq!(seen[0].header("content-type"), Some("application/x-ndjson"));
    assert_eq!(seen[0].header("transfer-encoding"), None);
    assert_eq!(seen[0].body, body.as_bytes());
    assert_eq!(seen[1].connection, 1);
}

#[test]
fn deletes_are_not_sent_where_they_would_create_an_index() {
    let stub = Stub::start(|_| Reply::Answer(404, r#"{"error":"alias [a] missing","status":404}"#));
    let mut body = Body::new();
    body.index("1", None, 1, b"{}");
    body.delete("2", None, 2);
    let outcomes = client(&stub.url).bulk(&Target { alias: "a".into(), pipeline: None }, &body).unwrap();
    assert!(matches!(outcomes[..], [crate::Outcome::IndexMissing { .. }, crate::Outcome::IndexMissing { .. }]));
    assert_eq!(stub.seen().iter().map(|seen| seen.line.as_str()).collect::<Vec<_>>(), ["GET /_alias/a"]);
}

#[test]
fn a_password_changed_in_its_file_is_taken_up_after_a_401() {
    let folder = Folder::new();
    let stub = Stub::start(|seen| match seen.header("authorization") {
        Some("Basic dTpuZXc=") => Reply::Answer(200, OK),
        _ => Reply::Answer(
            401,
            r#"{"error":{"type":"security_exception","reason":"unable to authenticate user [u]"},"status":401}"#,
        ),
    });
    let mut config = config(&stub.url);
    config.username = Some("u".into());
    config.password_file = Some(folder.write("password", "old"));
    let client = Client::new(config).unwrap();
    assert_eq!(kind(bulk(&client)), FailureKind::Unauthorized);
    assert_eq!(stub.seen().len(), 1, "what was refused was sent again unchanged");
    folder.write("password", "new\n");
    bulk(&client).unwrap();
    bulk(&client).unwrap();
    assert_eq!(stub.seen().len(), 4, "the new password was not kept");
    assert!(!format!("{client:?}").contains("new"));
}

#[test]
fn statuses_become_kinds() {
    const REASON: &str = r#"{"error":{"type":"illegal_argument_exception","reason":"bad"}}"#;
    for (status, body, expected) in [
        (400, REASON, FailureKind::BadRequest),
        // Nobody's word about a request.
        (400, r#"{"error":"Bad Request"}"#, FailureKind::BadAnswer),
        (405, r#"{"error":"wrong method"}"#, FailureKind::BadAnswer),
        (400, "<html>The SSL certificate error</html>", FailureKind::BadAnswer),
        (421, "", FailureKind::BadAnswer),
        (403, "", FailureKind::Unauthorized),
        (409, "", FailureKind::Conflict),
        (413, "", FailureKind::TooLarge),
        (429, "", FailureKind::TooManyRequests),
        (502, "", FailureKind::Broken),
        (503, "", FailureKind::Unavailable),
        (504, "", FailureKind::Timeout),
        (307, "", FailureKind::BadAnswer),
    ] {
        let stub = Stub::start(move |_| Reply::Answer(status, body));
        let failure = bulk(&client(&stub.url)).unwrap_err();
        assert_eq!((failure.kind, failure.status), (expected, Some(status)));
        assert_eq!(stub.seen().len(), 1);
    }
}

#[test]
fn a_request_that_may_have_arrived_is_not_sent_again() {
    let replies: [(fn() -> Reply, FailureKind); 3] = [
        (|| Reply::HangUp, FailureKind::Broken),
        (|| Reply::Cut, FailureKind::Broken),
        (|| Reply::Silence, FailureKind::Timeout),
    ];
    for (reply, expected) in replies {
        let stub = Stub::start(move |_| reply());
        let mut config = config(&format!("{0},{0}", stub.url));
        config.request_timeout = Duration::from_millis(300);
        let failure = bulk(&Client::new(config).unwrap()).unwrap_err();
        assert_eq!(failure.kind, expected, "{failure}");
        assert!(failure.kind.outcome_unknown());
        assert_eq!(stub.seen().len(), 1);
    }
}

#[test]
fn a_node_that_refuses_or_hangs_is_passed_over() {
    let stub = Stub::start(|_| Reply::Answer(200, OK));
    let (hanging, _listener, _held) = hanging_url();
    let client = client(&format!("{},{hanging},{}", refusing_url(), stub.url));
    for _ in 0..3 {
        bulk(&client).unwrap();
    }
    assert_eq!(stub.seen().len(), 3);
}

#[test]
fn a_node_that_gives_no_answer_is_left_alone_until_it_answers_something_that_costs_nothing() {
    let replies: [fn() -> Reply; 4] =
        [|| Reply::Silence, || Reply::HangUp, || Reply::Answer(503, ""), || Reply::Answer(502, "")];
    for reply in replies {
        let broken = Stub::start(move |_| reply());
        let works = Stub::start(|_| Reply::Answer(200, OK));
        let mut config = config(&format!("{},{}", broken.url, works.url));
        config.request_timeout = Duration::from_millis(300);
        let client = Client::new(config).unwrap();
        let failed = (0..6).filter(|_| bulk(&client).is_err()).count();
        assert_eq!((failed, works.seen().len()), (1, 5));
        let bulks = broken.seen().iter().filter(|seen| seen.line.contains("_bulk")).count();
        assert_eq!(bulks, 1, "the others had it avoided, or asked for its root");
    }
}

#[test]
fn no_node_at_all_is_unreachable_and_known_not_to_have_happened() {
    let (hanging, _listener, _held) = hanging_url();
    for url in [refusing_url(), hanging, "http://nonexistent.invalid:9200".into()] {
        let client = client(&url);
        for result in [bulk(&client).map(|_| ()), client.delete_index("a").map(|_| ())] {
            let failure = result.unwrap_err();
            assert_eq!(failure.kind, FailureKind::Unreachable, "{failure}");
            assert!(failure.reason.starts_with(&url) && !failure.kind.outcome_unknown());
        }
    }
}

#[test]
fn shutdown_ends_requests_in_flight_and_later_ones() {
    let stub = Stub::start(|_| Reply::Silence);
    let client = client(&stub.url);
    let in_flight = thread::spawn({
        let client = client.clone();
        move || bulk(&client)
    });
    let deadline = Instant::now() + Duration::from_secs(5);
    while stub.seen().is_empty() {
        assert!(Instant::now() < deadline, "the request did not arrive");
        thread::yield_now();
    }
    let start = Instant::now();
    client.shutdown();
    assert_eq!(kind(in_flight.join().unwrap()), FailureKind::Shutdown);
    assert_eq!(kind(bulk(&client)), FailureKind::Shutdown);
    assert!(start.elapsed() < Duration::from_secs(2), "it took {:?}", start.elapsed());
}

#[test]
fn a_proxys_404_does_not_mean_that_an_index_is_gone() {
    let stub = Stub::start(|_| Reply::Answer(404, "<html>not found</html>"));
    let client = client(&stub.url);
    assert_eq!(kind(client.index("a")), FailureKind::BadAnswer);
    assert_eq!(kind(client.alias("a")), FailureKind::BadAnswer);
    assert_eq!(kind(client.delete_index("a")), FailureKind::BadAnswer);
}

#[test]
fn a_change_that_not_all_nodes_know_of_is_not_taken_for_done() {
    let stub = Stub::start(|_| Reply::Answer(200, r#"{"acknowledged":false}"#));
    assert_eq!(kind(client(&stub.url).update_aliases(&serde_json::json!([]))), FailureKind::Timeout);
}

#[test]
fn a_refresh_of_some_shards_only_is_not_taken_for_all() {
    let stub = Stub::start(|_| Reply::Answer(200, r#"{"_shards":{"total":2,"successful":1,"skipped":0,"failed":1}}"#));
    assert_eq!(kind(client(&stub.url).refresh("a")), FailureKind::Unavailable);
}

#[test]
fn an_index_with_a_shard_on_no_node_is_not_refreshed() {
    for (status, body, refreshed) in [
        (200, r#"{"status":"red"}"#, false),
        (200, r#"{"status":"yellow"}"#, true),
        (403, "{}", true),
        (408, "{}", true),
    ] {
        let stub = Stub::start(move |seen| match seen.line.starts_with("GET /_cluster/health/a?") {
            true => Reply::Answer(status, body),
            false => Reply::Answer(200, r#"{"_shards":{"total":2,"successful":0,"failed":0}}"#),
        });
        let result = client(&stub.url).refresh("a");
        assert_eq!(result.is_ok(), refreshed, "{status} {body}");
        let asked = stub.seen().iter().any(|seen| seen.line == "POST /a/_refresh");
        assert_eq!(asked, refreshed, "{status} {body}");
    }
}

#[test]
fn the_hosted_engine_that_forbids_node_info_is_asked_otherwise() {
    let stub = Stub::start(|seen| match seen.line.as_str() {
        "GET /" => Reply::Answer(200, r#"{"version":{"number":"2.11.0","distribution":"opensearch"}}"#),
        _ => Reply::Answer(403, r#"{"Message":"not allowed"}"#),
    });
    assert_eq!(client(&stub.url).info().unwrap().version, "2.11.0");
}

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// Certificate and key, PEM.
    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new([name.to_string()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    }

    /// A stub that asks for a client's certificate if `mutual`.
    fn stub(&self, mutual: bool) -> Stub {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = if mutual {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(self.pem().as_bytes()).unwrap()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let (cert, key) = self.issue("127.0.0.1");
        let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()];
        let tls = builder.with_single_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap();
        Stub::start_tls(tls, |_| Reply::Answer(200, OK))
    }
}

#[test]
fn only_the_given_authority_is_trusted() {
    let (folder, ours, other) = (Folder::new(), Authority::new(), Authority::new());
    let stub = ours.stub(false);
    let mut config = config(&stub.url);
    for ca in [None, Some(folder.write("other", &other.pem()))] {
        config.ca_file = ca;
        let failure = bulk(&Client::new(config.clone()).unwrap()).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Unreachable, "{failure}");
        assert!(failure.reason.contains("certificate"), "{failure}");
        let failure = Client::new(config.clone()).unwrap().info().unwrap_err();
        assert_eq!(failure.kind, FailureKind::Unreachable, "{failure}");
    }
    config.ca_file = Some(folder.write("both", &format!("{}{}", other.pem(), ours.pem())));
    bulk(&Client::new(config).unwrap()).unwrap();
}

#[test]
fn a_client_certificate_is_shown_where_it_is_asked_for() {
    let (folder, authority) = (Folder::new(), Authority::new());
    let stub = authority.stub(true);
    let mut config = config(&stub.url);
    config.ca_file = Some(folder.write("ca", &authority.pem()));
    assert!(bulk(&Client::new(config.clone()).unwrap()).unwrap_err().kind.is_transient());
    let (cert, key) = authority.issue("us");
    config.client_cert_file = Some(folder.write("cert", &cert));
    config.client_key_file = Some(folder.write("key", &key));
    bulk(&Client::new(config).unwrap()).unwrap();
}

#[test]
fn certificates_that_cannot_be_used_are_told_at_once() {
    let (folder, authority) = (Folder::new(), Authority::new());
    let (cert, key) = authority.issue("us");
    let (_, other_key) = authority.issue("them");
    let files: Mutex<u32> = Mutex::new(0);
    let file = |text: &str| {
        let mut number = files.lock().unwrap();
        *number += 1;
        Some(folder.write(&number.to_string(), text))
    };
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (ca, cert, key) in [
        (file("no pem"), None, None),
        (file(broken), None, None),
        (Some("/nonexistent/ca".into()), None, None),
        (None, file(&cert), None),
        (None, None, file(&key)),
        (None, file(&cert), file(&cert)),
        (None, file(&cert), file(&other_key)),
        (None, file(broken), file(&key)),
    ] {
        let mut config = config("https://a");
        (config.ca_file, config.client_cert_file, config.client_key_file) = (ca, cert, key);
        let error = Client::new(config.clone()).expect_err(&format!("{config:?} was taken"));
        assert!(!error.to_string().contains("BEGIN PRIVATE"), "{error}");
    }
}
