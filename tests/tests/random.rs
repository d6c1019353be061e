//! Random operations by several writers at once, while the worker is ended and the engine fails, and after each round every
//! document compared with its table or view.
//!
//! Kinds of operations are dealt from a shuffled deck, so that each occurs often enough, and each has to change
//! something to count. PG_ES_SYNC_SEED=number repeats what the writers do; how they interleave differs each time.
//!
//! The same tables are there three times, lest one operation mend what another one has missed. Nothing asks for an index of
//! schema "calm" to be mended or built anew, in "emptied" only TRUNCATE does, and in "rough" everything happens.
//! tests/breaks holds what must make this fail.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Mutex;
use std::thread;

use pg_es_sync_tests::{Engine, Fault, Proxy, Server, expect, unique, wait};
use postgres::error::SqlState;
use postgres::{Client, Transaction};

const ROUNDS: usize = 4;
const WRITERS: usize = 4;

/// Keys are few, so that they are used again, and writers meet.
const ACCOUNTS: u32 = 150;
const HOSTS: u32 = 12;
const EXPENSES: u32 = 200;
const ITEMS: u32 = 400;

/// Table bulk has more bytes of keys than a savepoint holds in memory (1 MB) before it spills them to the queue.
const TABLES: &str = r#"
create table host (id int primary key, name text, private boolean not null default false);
create table account (
    id int primary key, host_id int, parent_id int, name text, private boolean not null default false,
    deleted_at timestamptz, unused text);
create table tag (word text primary key, color text, hidden boolean not null default false);
create table account_tag (
    account_id int, word text references tag on update cascade on delete cascade, primary key (account_id, word));
create table expense (region text, id int, account_id int, status text, amount int, primary key (region, id))
    partition by list (region);
create table expense_a partition of expense for values in ('a');
create table expense_b (status text, amount int, account_id int, id int not null, region text not null);
alter table expense attach partition expense_b for values in ('b');
create table expense_c partition of expense for values in ('c');
create table item (id int primary key, region text, expense_id int, label text, amount int);
create table bulk (k text primary key, n int);

create index on account (host_id);
create index on account (parent_id);
create index on account_tag (word);
create index on expense (account_id);
create index on item (region, expense_id);

create view account_document as
select a.id, a.name, a.private, a.deleted_at, h.name as host, h.private as host_private, p.name as parent,
       (select count(*) from account c where c.parent_id = a.id) as children,
       (select string_agg(t.word || ': ' || t.color, ', ' order by t.word)
        from account_tag l join tag t on t.word = l.word where l.account_id = a.id and not t.hidden) as tags,
       (select sum(i.amount) from expense e join item i on i.region = e.region and i.expense_id = e.id
        where e.account_id = a.id) as spent
from account a left join host h on h.id = a.host_id left join account p on p.id = a.parent_id;

create view expense_document as
select e.region, e.id, e.status, e.amount, a.name as account, h.name as host,
       (select jsonb_agg(jsonb_build_object('label', i.label, 'amount', i.amount) order by i.id)
        from item i where i.region = e.region and i.expense_id = e.id) as items
from expense e left join account a on a.id = e.account_id left join host h on h.id = a.host_id;

insert into host select i, 'host ' || i from generate_series(1, 12) i;
insert into account select i, 1 + i % 12, i % 40, 'account ' || i from generate_series(1, 150, 2) i;
insert into tag select 'word ' || i, 'red' from generate_series(1, 60) i;
insert into account_tag select i * 7 % 150, 'word ' || 1 + i % 60 from generate_series(1, 120) i;
insert into expense select chr(97 + i % 3), i, i % 150, 'paid', i from generate_series(1, 200, 2) i;
insert into item select i, chr(97 + i % 3), i % 200, 'item ' || i, i from generate_series(1, 400, 2) i;
insert into bulk select repeat('x', 450) || i, 0 from generate_series(1, 2200) i;
"#;

/// `{s}` is the schema, `{i}` the beginning of the indexes' names.
const ATTACH: &str = r#"
select es_sync.attach('{s}.account', index => '{i}-{s}-account', document => '{s}.account_document',
                      filter => 'private is not true and host_private is not true and deleted_at is null');
select es_sync.attach('{s}.expense', index => '{i}-{s}-expense', document => '{s}.expense_document',
                      filter => 'status <> ''draft''');
select es_sync.attach('{s}.tag', index => '{i}-{s}-tag', filter => 'not hidden');
select es_sync.attach('{s}.bulk', index => '{i}-{s}-bulk');
"#;

/// How it is done, and how many are dealt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    // Changes of rows, alone in their transaction; these also happen inside of the others.
    Insert,
    Upsert,
    Merge,
    Update,
    UpdateMany,
    UpdateUnusedColumn,
    Delete,
    DeleteAndInsert,
    ChangeKey,
    ChangeTextKey,
    ChangePartOfKey,
    SwapKeys,
    FlipFilter,
    FlipRelatedFilter,
    DeleteSoftly,
    MoveToPartition,
    WriteToPartition,
    InsertRelated,
    UpdateRelated,
    DeleteRelated,
    ChangeRelatedKey,
    ReparentRoot,
    ReparentRelated,
    ReparentSelf,
    ReparentInJoinTable,
    // Transactions of several changes.
    Copy,
    RollBack,
    RollBackToSavepoint,
    ReleaseSavepoint,
    ExceptionBlocks,
    RollBackSpill,
    ReleaseSpill,
    CommitPrepared,
    RollBackPrepared,
    CreatePartition,
    AddColumn,
    // What has an index mended or built anew.
    RenameColumn,
    DropColumn,
    AttachPartition,
    DetachPartition,
    DropPartition,
    TruncateRoot,
    TruncateRelated,
    TruncatePartition,
    CaptureOff,
    Reindex,
    // What happens around them.
    EndWorker,
    FailEngine,
}

use Kind::*;

const CHANGES: [Kind; 25] = [
    Insert,
    Upsert,
    Merge,
    Update,
    UpdateMany,
    UpdateUnusedColumn,
    Delete,
    DeleteAndInsert,
    ChangeKey,
    ChangeTextKey,
    ChangePartOfKey,
    SwapKeys,
    FlipFilter,
    FlipRelatedFilter,
    DeleteSoftly,
    MoveToPartition,
    WriteToPartition,
    InsertRelated,
    UpdateRelated,
    DeleteRelated,
    ChangeRelatedKey,
    ReparentRoot,
    ReparentRelated,
    ReparentSelf,
    ReparentInJoinTable,
];
const TRANSACTIONS: [Kind; 6] =
    [Copy, RollBack, RollBackToSavepoint, ReleaseSavepoint, ExceptionBlocks, CommitPrepared];
const RARE: [Kind; 17] = [
    RollBackSpill,
    ReleaseSpill,
    RollBackPrepared,
    CreatePartition,
    AddColumn,
    RenameColumn,
    DropColumn,
    AttachPartition,
    DetachPartition,
    DropPartition,
    TruncateRoot,
    TruncateRelated,
    TruncatePartition,
    CaptureOff,
    Reindex,
    EndWorker,
    FailEngine,
];

/// The schema where an operation takes place.
fn schema(kind: Kind, random: &mut fastrand::Rng) -> &'static str {
    let schemas = match kind {
        RenameColumn | DropColumn | AttachPartition | DetachPartition | DropPartition | CaptureOff | Reindex => {
            ["rough"; 4]
        }
        TruncateRoot | TruncateRelated | TruncatePartition => ["emptied", "emptied", "emptied", "rough"],
        _ => ["calm", "calm", "emptied", "rough"],
    };
    random.choice(schemas).unwrap_or_default()
}

/// At least as many of each kind must have occurred.
const LEAST: usize = 20;
const OPERATIONS: usize = 2000;

/// What is dealt in a round: with four of them 56 of each change and transaction, 24 of each rare kind.
fn deck(random: &mut fastrand::Rng) -> Vec<Kind> {
    let often = CHANGES.iter().chain(&TRANSACTIONS).flat_map(|kind| [*kind; 14]);
    let mut deck: Vec<Kind> = often.chain(RARE.iter().flat_map(|kind| [*kind; 6])).collect();
    random.shuffle(&mut deck);
    deck
}

#[test]
fn random_operations_end_in_equality_on_elasticsearch() {
    play(&Engine::elasticsearch());
}

#[test]
fn random_operations_end_in_equality_on_opensearch() {
    play(&Engine::opensearch());
}

fn play(engine: &Engine) {
    let seed = match std::env::var("PG_ES_SYNC_SEED") {
        Ok(seed) => seed.parse().expect("PG_ES_SYNC_SEED is a number"),
        Err(_) => fastrand::u64(..),
    };
    println!("PG_ES_SYNC_SEED={seed} on {:?}", engine.product());
    let proxy = Proxy::to(engine.url());
    let server = Server::builder()
        .conf("es_sync.url", proxy.url())
        .conf("es_sync.retry_max_delay", "200ms")
        .conf("es_sync.poll_interval", "200ms")
        // So short that what is sent again after a doubtful outcome is sent within the test.
        .conf("es_sync.request_timeout", "3s")
        .conf("deadlock_timeout", "50ms")
        .start();
    let mut client = server.create_database("random");
    let index = unique("random");
    for schema in ["calm", "emptied", "rough"] {
        let sql = format!("create schema {schema}; set search_path = {schema}; {TABLES} {ATTACH} reset search_path");
        let sql = sql.replace("{s}", schema).replace("{i}", &index);
        client.batch_execute(&sql).unwrap_or_else(|error| panic!("{error:?}"));
    }
    expect::everything_equal(&mut client, engine);

    let mut random = fastrand::Rng::with_seed(seed);
    let world = World { server: &server, proxy: &proxy, fault: Mutex::new(()) };
    let mut writers: Vec<Writer> = (0..WRITERS).map(|number| Writer::new(&world, number, random.fork())).collect();
    for round in 1..=ROUNDS {
        let cards = deck(&mut random);
        thread::scope(|scope| {
            for (writer, cards) in writers.iter_mut().zip(cards.chunks(cards.len().div_ceil(WRITERS))) {
                scope.spawn(move || cards.iter().for_each(|kind| writer.play(*kind)));
            }
        });
        println!("round {round} is played");
        expect::everything_equal(&mut client, engine);
    }

    let mut occurred = BTreeMap::<Kind, usize>::new();
    for (kind, count) in writers.iter().flat_map(|writer| &writer.occurred) {
        *occurred.entry(*kind).or_default() += count;
    }
    let all: usize = occurred.values().sum();
    let repeated: usize = writers.iter().map(|writer| writer.repeated).sum();
    println!("{all} operations, {repeated} begun again after a conflict or because there was nothing to change:");
    occurred.iter().for_each(|(kind, count)| println!("{count:6} {kind:?}"));
    assert!(all >= OPERATIONS, "{all} operations are too few");
    for kind in CHANGES.iter().chain(&TRANSACTIONS).chain(&RARE) {
        let count = occurred.get(kind).copied().unwrap_or_default();
        assert!(count >= LEAST, "{kind:?} occurred {count} times only");
    }
    let number = |client: &mut Client, query: &str| -> i64 { client.query_one(query, &[]).expect("query").get(0) };
    assert_eq!(number(&mut client, "select count(*) from es_sync.dead_letters"), 0);
    // A worker that ends while it takes the lease may leave its successor unsure, so that it compares. What it mended
    // would hide what this is here to find.
    let compared = "select count(*) from es_sync.jobs where relation like 'calm.%' and kind <> 'load'";
    println!("{} indexes of schema calm were compared by the way", number(&mut client, compared));
    let mended = "select coalesce(sum(missing + different + orphaned), 0)::int8 from es_sync.jobs
                  where relation like 'calm.%' and kind = 'verify'";
    assert_eq!(number(&mut client, mended), 0, "documents of schema calm that were mended");
    let rebuilt = "select count(*) from es_sync.jobs where relation like 'calm.%' and kind = 'reindex'";
    assert_eq!(number(&mut client, rebuilt), 0, "indexes of schema calm that were built anew");
}

struct World<'a> {
    server: &'a Server,
    proxy: &'a Proxy,
    /// One fault at a time.
    fault: Mutex<()>,
}

struct Writer<'a> {
    world: &'a World<'a>,
    number: usize,
    client: Client,
    random: fastrand::Rng,
    occurred: BTreeMap<Kind, usize>,
    repeated: usize,
    /// For names that are used once.
    serial: usize,
}

/// Why an operation did not take place.
enum Failure {
    NothingToChange,
    Sql(postgres::Error),
}

impl From<postgres::Error> for Failure {
    fn from(error: postgres::Error) -> Self {
        Self::Sql(error)
    }
}

type Outcome = Result<(), Failure>;

/// What writers do to each other, and keys that are taken.
const CONFLICTS: [SqlState; 5] = [
    SqlState::T_R_DEADLOCK_DETECTED,
    SqlState::T_R_SERIALIZATION_FAILURE,
    SqlState::LOCK_NOT_AVAILABLE,
    SqlState::UNIQUE_VIOLATION,
    SqlState::FOREIGN_KEY_VIOLATION,
];

impl<'a> Writer<'a> {
    fn new(world: &'a World<'a>, number: usize, random: fastrand::Rng) -> Self {
        let mut client = world.server.connect("random");
        client.batch_execute("set lock_timeout = '3s'").expect("set");
        Self { world, number, client, random, occurred: BTreeMap::new(), repeated: 0, serial: 0 }
    }

    /// Does it, with other rows where these are in use or not there.
    fn play(&mut self, kind: Kind) {
        let mut last = String::new();
        for _ in 0..200 {
            match self.attempt(kind) {
                Ok(()) => {
                    *self.occurred.entry(kind).or_default() += 1;
                    return;
                }
                Err(Failure::NothingToChange) => last = "nothing to change".into(),
                Err(Failure::Sql(error)) if error.code().is_some_and(|code| CONFLICTS.contains(code)) => {
                    last = error.to_string();
                }
                Err(Failure::Sql(error)) => panic!("{kind:?}: {error:?}"),
            }
            self.repeated += 1;
        }
        panic!("{kind:?} was tried in vain: {last}");
    }

    fn attempt(&mut self, kind: Kind) -> Outcome {
        let schema = schema(kind, &mut self.random);
        // What is taken away is added first.
        match kind {
            RenameColumn | DropColumn => self.attempt_in(schema, AddColumn)?,
            DetachPartition | DropPartition => self.attempt_in(schema, AttachPartition)?,
            _ => {}
        }
        self.attempt_in(schema, kind)
    }

    fn attempt_in(&mut self, schema: &str, kind: Kind) -> Outcome {
        match kind {
            EndWorker => return self.end_worker(),
            FailEngine => return self.fail_engine(schema),
            CommitPrepared | RollBackPrepared => return self.prepare(schema, kind),
            _ => {}
        }
        let Self { client, random, serial, number, .. } = self;
        *serial += 1;
        let name = format!("n{number}_{serial}");
        let mut transaction = begin(client, random, schema)?;
        match kind {
            Copy => {
                change(&mut transaction, random)?;
                let mut copy = transaction.copy_in("copy tag (word, color) from stdin")?;
                for row in 0..5 {
                    writeln!(copy, "copied {name} {row}\tgreen").expect("copy");
                }
                copy.finish()?;
            }
            RollBack => {
                changes(&mut transaction, random, 3)?;
                transaction.rollback()?;
                return Ok(());
            }
            RollBackToSavepoint => {
                changes(&mut transaction, random, 2)?;
                let mut savepoint = transaction.transaction()?;
                changes(&mut savepoint, random, 3)?;
                savepoint.rollback()?;
                changes(&mut transaction, random, 1)?;
            }
            ReleaseSavepoint => {
                changes(&mut transaction, random, 1)?;
                let mut outer = transaction.transaction()?;
                changes(&mut outer, random, 2)?;
                let mut inner = outer.transaction()?;
                changes(&mut inner, random, 2)?;
                if random.bool() {
                    inner.commit()?;
                } else {
                    inner.rollback()?;
                }
                outer.commit()?;
            }
            ExceptionBlocks => transaction.batch_execute(&format!(
                "do $$ begin
                     for i in 1..20 loop
                         begin
                             update account set name = '{name} ' || i where id = i;
                             update item set label = '{name} ' || i where id = 2 * i;
                             if i % 3 = 0 then raise exception 'no'; end if;
                         exception when raise_exception then null;
                         end;
                     end loop;
                 end $$"
            ))?,
            RollBackSpill => {
                changes(&mut transaction, random, 3)?;
                let mut savepoint = transaction.transaction()?;
                savepoint.execute("update bulk set n = n + 1", &[])?;
                savepoint.rollback()?;
            }
            ReleaseSpill => {
                changes(&mut transaction, random, 2)?;
                let mut savepoint = transaction.transaction()?;
                savepoint.execute("update bulk set n = n + 1", &[])?;
                changes(&mut savepoint, random, 2)?;
                savepoint.commit()?;
            }
            CreatePartition => transaction.batch_execute(&format!(
                "create table expense_{name} partition of expense for values in ('{name}');
                 insert into expense select '{name}', i, i, 'paid', i from generate_series(1, 3) i;
                 insert into expense_{name} values ('{name}', 4, 4, 'draft', 4)"
            ))?,
            AddColumn => {
                transaction.batch_execute(&format!("alter table tag add column x_{name} text"))?;
                if random.bool() {
                    transaction.commit()?;
                    transaction = begin(client, random, schema)?;
                }
                execute(&mut transaction, &[format!("update tag set x_{name} = color where not hidden")])?;
            }
            RenameColumn | DropColumn => {
                let column = oldest(&mut transaction, "tag", ADDED_COLUMNS)?;
                let action = if kind == DropColumn { "drop column" } else { "rename" };
                let to = if kind == DropColumn { String::new() } else { format!("to x_{name}") };
                transaction.batch_execute(&format!("alter table tag {action} {column} {to}"))?;
                change(&mut transaction, random)?;
            }
            AttachPartition => {
                transaction.batch_execute(&format!(
                    "create table expense_{name} (like expense);
                     insert into expense_{name}
                     select '{name}', i, i, case i when 5 then 'draft' else 'paid' end, i from generate_series(1, 5) i"
                ))?;
                if random.bool() {
                    transaction.commit()?;
                    transaction = begin(client, random, schema)?;
                }
                transaction.batch_execute(&format!(
                    "alter table expense attach partition expense_{name} for values in ('{name}');
                     update expense set amount = 6 where region = '{name}' and id = 2"
                ))?;
            }
            DetachPartition => {
                let partition = oldest(&mut transaction, "expense", ADDED_PARTITIONS)?;
                transaction.batch_execute(&format!(
                    "alter table expense detach partition {partition}; update {partition} set amount = 7"
                ))?;
            }
            DropPartition => {
                let partition = oldest(&mut transaction, "expense", ADDED_PARTITIONS)?;
                transaction.batch_execute(&format!("drop table {partition}"))?;
            }
            TruncateRoot | TruncateRelated | TruncatePartition => {
                let (empty, fill) = truncation(kind, random);
                transaction.batch_execute(empty)?;
                if random.bool() {
                    transaction.commit()?;
                    transaction = begin(client, random, schema)?;
                }
                transaction.batch_execute(fill)?;
            }
            CaptureOff => {
                transaction.batch_execute("set local es_sync.capture = off")?;
                changes(&mut transaction, random, 3)?;
            }
            Reindex => {
                let table = random.choice(["account", "expense", "tag"]).unwrap_or_default();
                transaction.execute(&format!("select es_sync.reindex('rough.{table}')"), &[])?;
            }
            change => execute(&mut transaction, &statements(change, random))?,
        }
        transaction.commit()?;
        Ok(())
    }

    fn prepare(&mut self, schema: &str, kind: Kind) -> Outcome {
        let Self { client, random, serial, number, .. } = self;
        *serial += 1;
        let name = format!("w{number}_{serial}");
        let mut transaction = begin(client, random, schema)?;
        changes(&mut transaction, random, 3)?;
        // One that has spilled asks for its table as a whole.
        if schema == "rough" && random.u8(..8) == 0 {
            let mut savepoint = transaction.transaction()?;
            savepoint.execute("update bulk set n = n + 1", &[])?;
            if random.bool() {
                savepoint.commit()?;
            } else {
                savepoint.rollback()?;
            }
        }
        transaction.batch_execute(&format!("prepare transaction '{name}'"))?;
        // Says COMMIT, which does nothing outside of a transaction.
        transaction.commit()?;
        let end = if kind == CommitPrepared { "commit" } else { "rollback" };
        client.batch_execute(&format!("{end} prepared '{name}'"))?;
        Ok(())
    }

    /// Ends it as a fast shutdown would; it lets go of its lease, and another one goes on.
    fn end_worker(&mut self) -> Outcome {
        wait::until("a worker was ended", wait::LONG, || -> bool {
            let end = "select coalesce(bool_or(pg_terminate_backend(pid)), false) from pg_stat_activity
                       where datname = 'random' and backend_type ilike '%es_sync%'";
            self.client.query_one(end, &[]).expect("could not end the worker").get(0)
        });
        Ok(())
    }

    /// One thing that may happen to bulk requests, or to all, and a change that meets it.
    fn fail_engine(&mut self, schema: &str) -> Outcome {
        let proxy = self.world.proxy;
        let _one = self.world.fault.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut transaction = begin(&mut self.client, &mut self.random, schema)?;
        transaction.batch_execute("update bulk set n = n + 1 where k like '%1'")?;
        proxy.forget_seen();
        let choice = self.random.u8(..5);
        match choice {
            0 => proxy.answer("_bulk", 2, 429, "{}"),
            1 => proxy.answer("_bulk", 2, 503, "{}"),
            2 => proxy.set_for("_bulk", Fault::ResetAfterRequest),
            3 => proxy.set_for("_bulk", Fault::LoseAnswer),
            _ => proxy.set(Fault::Refuse),
        }
        let outcome = transaction.commit();
        if outcome.is_ok() {
            match choice {
                0 | 1 => wait::until("these answers were given", wait::LONG, || proxy.answers_left() == 0),
                2 | 3 => wait::until("a request came by", wait::LONG, || !proxy.seen("_bulk").is_empty()),
                _ => wait::until("the worker has noticed", wait::LONG, || -> bool {
                    let noticed = "select bool_or(state in ('waiting', 'no worker')) from es_sync.status";
                    self.client.query_one(noticed, &[]).expect("status").get(0)
                }),
            }
        }
        proxy.set(Fault::Pass);
        proxy.forget_answers();
        outcome?;
        Ok(())
    }
}

/// A transaction in a schema, now and then in another isolation level.
fn begin<'c>(client: &'c mut Client, random: &mut fastrand::Rng, schema: &str) -> Result<Transaction<'c>, Failure> {
    let mut transaction = client.transaction()?;
    let level = match random.u8(..16) {
        0 => "set transaction isolation level repeatable read;",
        1 => "set transaction isolation level serializable;",
        _ => "",
    };
    transaction.batch_execute(&format!("{level} set local search_path = {schema}"))?;
    Ok(transaction)
}

/// Columns and partitions that operations have added, by name.
const ADDED_COLUMNS: &str = "
    select attname::text from pg_attribute
    where attrelid = 'tag'::regclass and attname like 'x\\_%' and not attisdropped order by attnum limit 1";
const ADDED_PARTITIONS: &str = "
    select c.relname::text from pg_inherits i join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'expense'::regclass and c.relname like 'expense\\_n%' order by c.oid limit 1";

/// What was added first, with its table locked, so that it is there until the end of the transaction.
fn oldest(transaction: &mut Transaction, table: &str, query: &str) -> Result<String, Failure> {
    transaction.batch_execute(&format!("lock table {table}"))?;
    match transaction.query_opt(query, &[])? {
        Some(row) => Ok(row.get(0)),
        None => Err(Failure::NothingToChange),
    }
}

/// One to `most` changes of random kinds.
fn changes(transaction: &mut Transaction, random: &mut fastrand::Rng, most: usize) -> Outcome {
    (0..random.usize(1..=most)).try_for_each(|_| change(transaction, random))
}

fn change(transaction: &mut Transaction, random: &mut fastrand::Rng) -> Outcome {
    let kind = random.choice(CHANGES).unwrap_or(Update);
    execute(transaction, &statements(kind, random))
}

/// Runs statements that must all change something.
fn execute(transaction: &mut Transaction, statements: &[String]) -> Outcome {
    for statement in statements {
        if transaction.execute(statement, &[])? == 0 {
            return Err(Failure::NothingToChange);
        }
    }
    Ok(())
}

/// What a change of this kind is in SQL, with random keys and values.
fn statements(kind: Kind, random: &mut fastrand::Rng) -> Vec<String> {
    let account = random.u32(1..=ACCOUNTS);
    let other = random.u32(1..=ACCOUNTS);
    let host = random.u32(1..=HOSTS);
    let expense = random.u32(1..=EXPENSES);
    let item = random.u32(1..=ITEMS);
    let region = random.choice(["a", "b", "c"]).unwrap_or_default();
    let amount = random.u32(1..1_000_000);
    let text = text(random);
    // The first row from a random key on.
    let an_account = format!("(select id from account where id >= {account} order by id limit 1)");
    let an_expense = format!("(select region, id from expense where id >= {expense} order by id, region limit 1)");
    let an_item = format!("(select id from item where id >= {item} order by id limit 1)");
    let a_tag = format!("(select word from tag order by md5(word || {amount}) limit 1)");
    let a_link =
        format!("(select account_id, word from account_tag where account_id >= {account} order by 1, 2 limit 1)");
    let one = |statement: String| vec![statement];
    let any = |statements: &[String], random: &mut fastrand::Rng| {
        vec![random.choice(statements).cloned().unwrap_or_default()]
    };
    match kind {
        Insert => any(
            &[
                format!(
                    "insert into account (id, host_id, parent_id, name) values ({account}, {host}, {other}, '{text}')"
                ),
                format!("insert into expense values ('{region}', {expense}, {account}, 'paid', {amount})"),
                format!("insert into tag values ('{text}', 'blue')"),
            ],
            random,
        ),
        Upsert => any(
            &[
                format!(
                    "insert into account (id, host_id, name) values ({account}, {host}, '{text}')
                     on conflict (id) do update set name = excluded.name, host_id = excluded.host_id"
                ),
                format!(
                    "insert into expense values ('{region}', {expense}, {account}, 'paid', {amount})
                     on conflict (region, id) do update set amount = excluded.amount, account_id = excluded.account_id"
                ),
            ],
            random,
        ),
        Merge => one(format!(
            "merge into account a using (select {account} union select {other}) v (id) on v.id = a.id
             when matched and a.id % 5 = 0 then delete
             when matched then update set name = '{text}'
             when not matched then insert (id, host_id, name) values (v.id, {host}, 'merged')"
        )),
        Update => any(
            &[
                format!("update account set name = '{text}' where id = {an_account}"),
                format!("update expense set amount = {amount} where (region, id) = {an_expense}"),
                format!("update tag set color = '{text}' where word = {a_tag}"),
            ],
            random,
        ),
        UpdateMany => any(
            &[
                format!("update account set name = name || '.' where id between {account} and {account} + 10"),
                format!(
                    "update expense e set amount = amount + 1 from account a where a.id = e.account_id and a.host_id = {host}"
                ),
            ],
            random,
        ),
        UpdateUnusedColumn => one(format!("update account set unused = '{text}' where id = {an_account}")),
        Delete => any(
            &[
                format!("delete from account where id = {an_account}"),
                format!("delete from expense where (region, id) = {an_expense}"),
                format!("delete from tag where word = {a_tag}"),
            ],
            random,
        ),
        DeleteAndInsert => vec![
            format!("delete from account where id = {account}"),
            format!("insert into account (id, host_id, name) values ({account}, {host}, '{text}')"),
        ],
        ChangeKey => one(format!("update account set id = {other} where id = {an_account}")),
        // Its rows in the join table follow by their foreign key.
        ChangeTextKey => one(format!("update tag set word = '{text}' where word = {a_tag}")),
        ChangePartOfKey => {
            one(format!("update expense set id = {} where (region, id) = {an_expense}", random.u32(1..=EXPENSES)))
        }
        SwapKeys => vec![
            format!("update account set id = -{account} where id = {account}"),
            format!("update account set id = {account} where id = {other}"),
            format!("update account set id = {other} where id = -{account}"),
        ],
        FlipFilter => any(
            &[
                format!("update account set private = not private where id = {an_account}"),
                format!(
                    "update expense set status = case status when 'draft' then 'paid' else 'draft' end
                     where (region, id) = {an_expense}"
                ),
                format!("update tag set hidden = not hidden where word = {a_tag}"),
            ],
            random,
        ),
        FlipRelatedFilter => one(format!("update host set private = not private where id = {host}")),
        DeleteSoftly => one(format!(
            "update account set deleted_at = case when deleted_at is null then now() end where id = {an_account}"
        )),
        MoveToPartition => one(format!(
            "update expense set region = '{region}' where (region, id) = (select region, id from expense
             where region <> '{region}' and id >= {expense} order by id, region limit 1)"
        )),
        WriteToPartition => any(
            &[
                format!(
                    "insert into expense_{region} (region, id, account_id, status, amount) values ('{region}', {expense}, {account}, 'paid', {amount})"
                ),
                format!("update expense_{region} set amount = {amount} where id between {expense} and {expense} + 5"),
                format!("delete from expense_{region} where id = {expense}"),
            ],
            random,
        ),
        InsertRelated => any(
            &[
                format!("insert into item values ({item}, '{region}', {expense}, '{text}', {amount})"),
                format!("insert into account_tag select {account}, word from tag where word = {a_tag}"),
            ],
            random,
        ),
        UpdateRelated => any(
            &[
                format!("update item set label = '{text}', amount = {amount} where id = {an_item}"),
                format!("update host set name = '{text}' where id = {host}"),
            ],
            random,
        ),
        DeleteRelated => any(
            &[
                format!("delete from item where id = {an_item}"),
                format!("delete from account_tag where (account_id, word) = {a_link}"),
            ],
            random,
        ),
        // Other accounts have this host then, without a change of theirs.
        ChangeRelatedKey => vec![
            format!("update host set id = -{host} where id = {host}"),
            format!("update host set id = {host} where id = {}", 1 + host % HOSTS),
            format!("update host set id = {} where id = -{host}", 1 + host % HOSTS),
        ],
        ReparentRoot => any(
            &[
                format!("update account set host_id = {host} where id = {an_account}"),
                format!("update expense set account_id = {account} where (region, id) = {an_expense}"),
            ],
            random,
        ),
        ReparentRelated => {
            one(format!("update item set region = '{region}', expense_id = {expense} where id = {an_item}"))
        }
        ReparentSelf => one(format!("update account set parent_id = {other} where id = {an_account}")),
        ReparentInJoinTable => {
            one(format!("update account_tag set account_id = {other} where (account_id, word) = {a_link}"))
        }
        kind => panic!("{kind:?} is no change"),
    }
}

/// How a table is emptied, and filled again.
fn truncation(kind: Kind, random: &mut fastrand::Rng) -> (&'static str, &'static str) {
    let truncations: &[(&str, &str)] = match kind {
        TruncateRoot => &[
            (
                "truncate account",
                "insert into account select i, 1 + i % 12, i % 9, 'again' from generate_series(5, 150, 3) i on conflict do nothing",
            ),
            (
                "truncate expense",
                "insert into expense select chr(97 + i % 3), i, i, 'paid', i from generate_series(5, 200, 3) i on conflict do nothing",
            ),
            (
                "truncate tag cascade",
                "insert into tag select 'again ' || i, 'red' from generate_series(1, 30) i on conflict do nothing",
            ),
        ],
        TruncateRelated => &[
            (
                "truncate item",
                "insert into item select i, chr(97 + i % 3), i % 200, 'again', i from generate_series(5, 400, 3) i on conflict do nothing",
            ),
            (
                "truncate account_tag",
                "insert into account_tag select 1 + n, word from tag, generate_series(1, 120, 50) n on conflict do nothing",
            ),
            (
                "truncate host",
                "insert into host select i, 'again' from generate_series(1, 12) i on conflict do nothing",
            ),
        ],
        _ => &[
            (
                "truncate expense_a",
                "insert into expense select 'a', i, i, 'paid', i from generate_series(5, 200, 7) i on conflict do nothing",
            ),
            (
                "truncate expense_b",
                "insert into expense_b (id, region) select i, 'b' from generate_series(5, 200, 9) i on conflict do nothing",
            ),
        ],
    };
    random.choice(truncations).copied().unwrap_or_default()
}

/// A text of a few characters, some of which mean something in keys, JSON or bulk requests.
fn text(random: &mut fastrand::Rng) -> String {
    let mut text = String::new();
    for _ in 0..random.usize(1..6) {
        let part = random.choice(["|", "\\", "\"", "''", " ", "ü", "😀", "{", "/", "a", "b", "c"]).unwrap_or_default();
        text.push_str(part);
    }
    write!(text, "{}", random.u16(..)).expect("a number can be written");
    text
}
