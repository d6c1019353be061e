//! What most tests of documents from views begin with: a database, a table `root`, and the view `document`.

use crate::{Engine, Server, expect, unique, wait};
use postgres::Client;

/// Hosts, and roots that show the name of theirs.
pub const HOSTS: &str = "
    create table host (id int primary key, name text, secret text);
    create table root (id int primary key, title text, host_id int references host);
    create index on root (host_id);
    create view document as
        select r.id, r.title, h.name as host from root r left join host h on h.id = r.host_id;
    insert into host values (1, 'one'), (2, 'two');
    insert into root select i, 'title ' || i, i % 3 from generate_series(3, 20) i where i % 3 > 0;
    insert into root values (1, 'without', null), (2, 'first', 1);";

/// Roots that show a price of which no view tells where it comes from: a function reads it.
pub const PRICES: &str = "
    create table root (id int primary key);
    create table price (id int primary key, root_id int, amount int);
    create function price_of(int) returns int stable language sql
        as 'select amount from public.price where root_id = $1';
    create view document as select id, public.price_of(id) as price from root;
    insert into root select generate_series(1, 10);
    insert into price select i, i, i from generate_series(1, 10) i;";

/// A server of its own with a database, and an index of its own name.
pub struct Shop {
    pub engine: Engine,
    pub server: Server,
    pub client: Client,
    pub index: String,
}

impl Shop {
    pub fn new(sql: &str) -> Self {
        Self::on(Engine::elasticsearch(), sql)
    }

    pub fn on(engine: Engine, sql: &str) -> Self {
        let server = Server::with(&engine);
        let client = server.create_database("shop");
        let mut shop = Self { engine, server, client, index: unique("views") };
        shop.run(sql);
        shop
    }

    pub fn run(&mut self, sql: &str) {
        self.client.batch_execute(sql).unwrap_or_else(|error| panic!("{error:?} in: {sql}"));
    }

    /// Attaches `root` with the view `document`.
    pub fn attach(&mut self) {
        let index = self.index.clone();
        self.run(&format!("select es_sync.attach('root', index => '{index}', document => 'document')"));
        self.settle();
    }

    /// All is searchable, and the index is what the view says.
    #[track_caller]
    pub fn settle(&mut self) {
        expect::settled(&mut self.client);
        let query = "select id, row_to_json(d) from document d";
        expect::documents_equal(&mut self.client, query, &self.engine, &self.index);
    }

    /// Runs each statement by itself, and compares all documents after it.
    #[track_caller]
    pub fn each(&mut self, statements: &[&str]) {
        for statement in statements {
            let before: String = self.text("select md5(string_agg(d::text, '' order by id)) from document d");
            self.run(statement);
            let after: String = self.text("select md5(string_agg(d::text, '' order by id)) from document d");
            assert_ne!(before, after, "the statement changes a document: {statement}");
            self.settle();
        }
    }

    /// Connects again to a server that has restarted, once it has another worker than the one that was killed.
    pub fn reconnect(&mut self, killed: Option<i32>) {
        self.client = wait::until("a worker runs again", wait::LONG, || {
            let mut client = self.server.try_connect("postgres", "shop").map_err(|error| error.to_string())?;
            let row = client
                .query_one("select max(worker_pid) from es_sync.status", &[])
                .map_err(|error| error.to_string())?;
            match row.get::<_, Option<i32>>(0) {
                Some(pid) if Some(pid) != killed => Ok(client),
                other => Err(format!("worker {other:?}")),
            }
        });
    }

    pub fn text(&mut self, query: &str) -> String {
        self.client.query_one(query, &[]).unwrap().get::<_, Option<String>>(0).unwrap_or_default()
    }

    pub fn count(&mut self, query: &str) -> i64 {
        self.client.query_one(query, &[]).unwrap().get(0)
    }

    /// What `attach` refuses: message, detail and hint.
    pub fn refused(&mut self, sql: &str) -> (String, String, String) {
        let error = self.client.batch_execute(sql).expect_err("it is refused");
        let error = error.as_db_error().expect("the server refuses it");
        let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
        (error.message().to_owned(), text(error.detail()), text(error.hint()))
    }
}
