//! What faults cost: writers while the engine is stopped and the drain after it, and good documents beside a bad one.

use crate::Scale;
use crate::report::{Report, Samples, row, thousands};
use pg_es_sync_tests::engine::Product;
use pg_es_sync_tests::{Engine, Server, expect, unique, wait};
use postgres::Client;
use std::time::{Duration, Instant};

const WRITERS: u32 = 2;
const PACE: Duration = Duration::from_millis(10);
const ROWS: i32 = 10_000;

pub fn measure(report: &mut Report, scale: &Scale) {
    report.line("## Faults");
    report.line("");
    outage(report, scale);
    poison(report, scale);
}

/// A private engine that is stopped and started again while writers go on.
fn outage(report: &mut Report, scale: &Scale) {
    let mut engine = Engine::private(Product::Elasticsearch);
    let server = Server::builder().conf("es_sync.url", engine.url()).durable().start();
    let mut client = server.create_database("bench");
    client
        .batch_execute(&format!(
            "create table outage (id int primary key, title text, n int);
             insert into outage select i, 'thing ' || i, 0 from generate_series(1, {ROWS}) i;
             select es_sync.attach('outage')"
        ))
        .expect("could not attach a table");
    expect::settled(&mut client);
    let seconds = Duration::from_secs(scale.outage_seconds.into());
    write(&server, Duration::from_secs(3));
    let (mut up, mut down, mut drain, mut backlog) =
        (Samples::default(), Samples::default(), Samples::default(), Samples::default());
    for _ in 0..scale.outage_rounds {
        up.add(write(&server, seconds).quantile(0.99));
        engine.stop("TERM");
        let writes = write(&server, seconds);
        down.add(writes.quantile(0.99));
        backlog.add(writes.count() as f64);
        engine.start();
        let back = Instant::now();
        expect::settled(&mut client);
        drain.add_time(back.elapsed());
        expect::table_equal(&mut client, "outage", "id", &engine, "outage");
    }
    report.line(&format!(
        "The engine is stopped for {} s under writes ({WRITERS} clients, each an UPDATE every {} ms, fsync on), then started;",
        scale.outage_seconds,
        PACE.as_millis()
    ));
    report.line(&format!(
        "no write failed, and every document was compared. Drained: from the engine's first answer until all is searchable. Medians of {}.",
        up.count()
    ));
    report.line("");
    report.table(&[
        row(["", "median", "range"]),
        row(["writers' p99, engine up, ms", &format!("{:.2}", up.median()), &up.range(2)]),
        row(["writers' p99, engine down, ms", &format!("{:.2}", down.median()), &down.range(2)]),
        row(["ratio", &format!("**{:.2}**", down.over(&up).median()), &down.over(&up).range(2)]),
        row(["changes in the meantime", &thousands(backlog.median()), &backlog.range(0)]),
        row(["drained after, s", &format!("**{:.1}**", drain.median()), &drain.range(1)]),
    ]);
}

/// Single-row updates for so long: milliseconds of each, its commit included.
fn write(server: &Server, time: Duration) -> Samples {
    let writer = |number: u32| {
        let mut client = server.connect("bench");
        let update = client.prepare("update outage set n = n + 1 where id = $1").expect("could not prepare the update");
        let (start, mut next, mut samples) = (Instant::now(), Instant::now(), Samples::default());
        let mut id = number as i32;
        while start.elapsed() < time {
            next += PACE;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            id = (id + 7) % ROWS + 1;
            let begin = Instant::now();
            client.execute(&update, &[&id]).expect("a write failed");
            samples.add(begin.elapsed().as_secs_f64() * 1e3);
        }
        samples
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS).map(|number| scope.spawn(move || writer(number))).collect();
        let mut all = Samples::default();
        for writer in writers {
            all.extend(writer.join().expect("a writer ended badly"));
        }
        all
    })
}

/// Updates of all rows at once, with and without one that the engine refuses.
fn poison(report: &mut Report, scale: &Scale) {
    let engine = Engine::elasticsearch();
    let server = Server::builder().conf("es_sync.url", engine.url()).start();
    let mut client = server.create_database("bench");
    let table = unique("poison");
    client
        .batch_execute(&format!(
            "create table {table} (id int primary key, amount text, filler text);
             insert into {table} select i, '1', repeat('x', 200) from generate_series(0, {ROWS}) i;
             select es_sync.attach('{table}',
                options => '{{\"mappings\": {{\"properties\": {{\"amount\": {{\"type\": \"integer\"}}}}}}}}')"
        ))
        .expect("could not attach a table");
    expect::settled(&mut client);
    let mut rounds = 1;
    let mut round = |poison: bool| {
        // Another value each time: an UPDATE that changes nothing sends nothing.
        rounds += 1;
        let value = match poison {
            true => format!("case when id = 5000 then 'poison' else '{rounds}' end"),
            false => format!("'{rounds}'"),
        };
        client.batch_execute(&format!("update {table} set amount = {value}")).expect("could not update");
        let start = Instant::now();
        settled(&mut client);
        let took = start.elapsed();
        let parked: i64 =
            client.query_one("select count(*) from es_sync.dead_letters", &[]).expect("dead letters").get(0);
        assert_eq!(parked, i64::from(poison), "dead letters");
        f64::from(ROWS) / took.as_secs_f64()
    };
    round(false);
    let (mut good, mut bad) = (Samples::default(), Samples::default());
    for _ in 0..scale.outage_rounds.max(3) * 2 {
        good.add(round(false));
        bad.add(round(true));
    }
    report.line(&format!(
        "{} rows are updated by one statement, without and with one among them that the engine refuses; from commit until",
        thousands(ROWS.into())
    ));
    report.line(&format!("all others are searchable. Medians of {} turns.", good.count()));
    report.line("");
    report.table(&[
        row(["", "documents/s", "range"]),
        row(["all good", &thousands(good.median()), &good.range(0)]),
        row(["one refused", &thousands(bad.median()), &bad.range(0)]),
        row(["ratio", &format!("**{:.2}**", bad.over(&good).median()), &bad.over(&good).range(2)]),
    ]);
}

fn settled(client: &mut Client) {
    wait::until("all is searchable", wait::LONG, || -> bool {
        client.query_one("select es_sync.wait(timeout => '60 s')", &[]).expect("could not wait").get(0)
    });
}
