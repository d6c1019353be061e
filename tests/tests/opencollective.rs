//! examples/opencollective, by the very files that its README runs: eight indexes that repeat names of host and parent.

use pg_es_sync_tests::{Engine, Server, expect, unique};
use postgres::Client;
use serde_json::{Value, json};

/// Name of the index and view of each kind of document.
const INDEXES: [(&str, &str); 8] = [
    ("collectives", "CollectiveDocuments"),
    ("tiers", "TierDocuments"),
    ("orders", "OrderDocuments"),
    ("expenses", "ExpenseDocuments"),
    ("transactions", "TransactionDocuments"),
    ("updates", "UpdateDocuments"),
    ("comments", "CommentDocuments"),
    ("host-applications", "HostApplicationDocuments"),
];

struct Example {
    engine: Engine,
    client: Client,
    /// In front of the names of its indexes.
    prefix: String,
    _server: Server,
}

impl Example {
    fn on(engine: Engine) -> Self {
        let server = Server::with(&engine);
        let client = server.create_database("opencollective");
        let mut example = Self { engine, client, prefix: unique("opencollective"), _server: server };
        let attach = include_str!("../../examples/opencollective/attach.sql");
        assert_eq!(attach.matches("'opencollective-").count(), INDEXES.len());
        let attach = attach.replace("'opencollective-", &format!("'{}-", example.prefix));
        for file in [
            include_str!("../../examples/opencollective/schema.sql"),
            include_str!("../../examples/opencollective/rows.sql"),
            include_str!("../../examples/opencollective/documents.sql"),
            &attach,
        ] {
            example.run(file);
        }
        example.settle();
        example
    }

    #[track_caller]
    fn run(&mut self, sql: &str) {
        self.client.batch_execute(sql).unwrap_or_else(|error| panic!("{error:?} in: {sql}"));
    }

    /// All is searchable, and every document of the eight indexes is as its view says.
    #[track_caller]
    fn settle(&mut self) {
        expect::everything_equal(&mut self.client, &self.engine);
    }

    fn number(&mut self, query: &str) -> i64 {
        self.client.query_one(query, &[]).unwrap_or_else(|error| panic!("{error:?} in: {query}")).get(0)
    }

    /// The ids that a query returns, as those of documents.
    fn ids(&mut self, query: &str) -> Vec<String> {
        let rows = self.client.query(query, &[]).unwrap_or_else(|error| panic!("{error:?} in: {query}"));
        rows.iter().map(|row| row.get::<_, i32>(0).to_string()).collect()
    }

    fn document(&self, index: &str, id: &str) -> Option<Value> {
        let source = self.engine.source(&format!("{}-{index}", self.prefix), id)?;
        Some(serde_json::from_str(&source).expect("a document is JSON"))
    }

    /// Ids of the documents that a query finds.
    fn found(&self, index: &str, query: Value) -> Vec<String> {
        self.engine.search_ids(&format!("{}-{index}", self.prefix), query)
    }

    /// Indexes that have a document of this id.
    fn indexes_with(&self, id: &str) -> Vec<&'static str> {
        INDEXES.iter().map(|(index, _)| *index).filter(|index| self.document(index, id).is_some()).collect()
    }
}

fn on_both_engines(promise: impl Fn(&mut Example)) {
    for engine in [Engine::elasticsearch(), Engine::opensearch()] {
        promise(&mut Example::on(engine));
    }
}

#[test]
fn ids_that_are_equal_across_tables_never_mix() {
    on_both_engines(|example| {
        let everywhere = INDEXES.map(|(_, view)| match view {
            "UpdateDocuments" => {
                r#"select "id" from "UpdateDocuments" where "publishedAt" is not null and not "isPrivate""#.to_owned()
            }
            view => format!(r#"select "id" from "{view}""#),
        });
        let ids = example.ids(&everywhere.join(" intersect "));
        let id = ids.first().expect("an id is in all eight indexes").clone();
        let mut left: Vec<&str> = INDEXES.iter().map(|(index, _)| *index).collect();
        assert_eq!(example.indexes_with(&id), left);
        for (index, statement) in [
            ("comments", r#"delete from "Comments" where "id" = "#),
            ("transactions", r#"delete from "Transactions" where "id" = "#),
            ("host-applications", r#"update "HostApplications" set "deletedAt" = now() where "id" = "#),
            ("orders", r#"update "Orders" set "deletedAt" = now() where "id" = "#),
            ("updates", r#"update "Updates" set "isPrivate" = true where "id" = "#),
        ] {
            example.run(&format!("{statement} {id}"));
            example.settle();
            left.retain(|other| *other != index);
            assert_eq!(example.indexes_with(&id), left, "after: {statement} {id}");
        }
        // One transaction that touches the same id in several tables.
        example.run(&format!(
            r#"begin;
               update "Tiers" set "name" = 'a tier' where "id" = {id};
               update "Expenses" set "description" = 'an expense' where "id" = {id};
               update "Collectives" set "name" = 'a collective' where "id" = {id};
               commit"#
        ));
        example.settle();
        for (index, field, value) in [
            ("tiers", "name", "a tier"),
            ("expenses", "description", "an expense"),
            ("collectives", "name", "a collective"),
        ] {
            assert_eq!(example.document(index, &id).expect("it is there")[field], json!(value), "{index}");
        }
    });
}

#[test]
fn a_collective_that_turns_private_takes_its_childrens_documents_along() {
    on_both_engines(|example| {
        let parent = example.number(
            r#"select "ParentCollectiveId"::int8 from "VisibleAccounts" where "ParentCollectiveId" is not null
               group by 1 order by count(*) desc, 1 limit 1"#,
        );
        let family = format!(r#"(select "id" from "Collectives" where {parent} in ("id", "ParentCollectiveId"))"#);
        let mut affected = Vec::new();
        for (index, view) in INDEXES {
            let column = if index == "collectives" { "id" } else { "CollectiveId" };
            affected.push((index, example.ids(&format!(r#"select "id" from "{view}" where "{column}" in {family}"#))));
        }
        // Drafts of updates among these have no document anyway.
        affected.iter_mut().for_each(|(index, ids)| ids.retain(|id| example.document(index, id).is_some()));
        assert!(affected.iter().filter(|(_, ids)| ids.len() > 1).count() >= 6, "it is about several: {affected:?}");
        let present = |example: &Example, expected: bool| {
            for (index, ids) in &affected {
                for id in ids {
                    assert_eq!(example.document(index, id).is_some(), expected, "{index} {id}");
                }
            }
        };
        present(example, true);
        for (hide, show) in
            [(r#""isPrivate" = true"#, r#""isPrivate" = false"#), (r#""deletedAt" = now()"#, r#""deletedAt" = null"#)]
        {
            example.run(&format!(r#"update "Collectives" set {hide} where "id" = {parent}"#));
            example.settle();
            present(example, false);
            example.run(&format!(r#"update "Collectives" set {show} where "id" = {parent}"#));
            example.settle();
            present(example, true);
        }
    });
}

#[test]
fn a_hosts_new_name_reaches_every_document_that_shows_it() {
    on_both_engines(|example| {
        example.run(r#"update "Collectives" set "name" = 'Open Source Host' where "slug" = 'host-3'"#);
        example.settle();
        let (mut all, named) = (0, json!({"term": {"hostName.keyword": "Open Source Host"}}));
        for (index, view) in INDEXES {
            let filter = if index == "updates" { r#"and "publishedAt" is not null and not "isPrivate""# } else { "" };
            let mut expected =
                example.ids(&format!(r#"select "id" from "{view}" where "hostName" = 'Open Source Host' {filter}"#));
            expected.sort();
            assert!(!expected.is_empty(), "{index} has documents that show it");
            assert_eq!(example.found(index, named.clone()), expected, "{index}");
            assert_eq!(example.found(index, json!({"term": {"hostName.keyword": "Host 3"}})), [""; 0], "{index}");
            all += expected.len();
        }
        println!("{all} documents show the host");
        // What its tenants' tenants show changes, too, when a collective moves to another host.
        example.run(r#"update "Collectives" set "HostCollectiveId" = 4 where "HostCollectiveId" = 3"#);
        example.settle();
        assert_eq!(example.found("expenses", named), [""; 0]);
    });
}

#[test]
fn deleting_an_item_changes_its_expense_and_its_collective() {
    on_both_engines(|example| {
        let row = example
            .client
            .query_one(
                r#"select i."id", i."amount"::int8, e."id"::text, e."CollectiveId"::text, i."description"
                   from "ExpenseItems" i join "ExpenseDocuments" e on e."id" = i."ExpenseId"
                   where jsonb_array_length(e."items") > 1 order by 1 limit 1"#,
                &[],
            )
            .expect("an item");
        let (item, amount): (i32, i64) = (row.get(0), row.get(1));
        let (expense, collective): (String, String) = (row.get(2), row.get(3));
        // An item is an object of its own for a search.
        let item_found = |example: &Example, amount: i64| {
            let (text, number) =
                (json!({"items.description": row.get::<_, String>(4)}), json!({"items.amount": amount}));
            let both = json!({"bool": {"must": [{"match_phrase": text}, {"term": number}]}});
            example.found("expenses", json!({"nested": {"path": "items", "query": both}}))
        };
        assert_eq!(item_found(example, amount), [expense.as_str()]);
        assert_eq!(item_found(example, amount + 1), [""; 0]);
        let shown = |example: &Example| -> (usize, i64, i64) {
            let document = example.document("expenses", &expense).expect("the expense is there");
            let account = example.document("collectives", &collective).expect("the collective is there");
            let items = document["items"].as_array().map_or(0, Vec::len);
            (items, document["amount"].as_i64().expect("amount"), account["expensed"].as_i64().expect("expensed"))
        };
        let (items, expense_amount, expensed) = shown(example);
        example.run(&format!(r#"delete from "ExpenseItems" where "id" = {item}"#));
        example.settle();
        assert_eq!(shown(example), (items - 1, expense_amount - amount, expensed - amount));
        assert_eq!(item_found(example, amount), [""; 0]);
    });
}

#[test]
fn soft_deletion_takes_documents_out_and_undeletion_brings_them_back() {
    on_both_engines(|example| {
        let expense = example.number(
            r#"select "ExpenseId"::int8 from "CommentDocuments" where "ExpenseId" is not null order by 1 limit 1"#,
        );
        let comments = example.ids(&format!(r#"select "id" from "CommentDocuments" where "ExpenseId" = {expense}"#));
        let both = |example: &Example| -> [bool; 2] {
            [
                example.document("expenses", &expense.to_string()).is_some(),
                comments.iter().all(|id| example.document("comments", id).is_some()),
            ]
        };
        assert_eq!(both(example), [true, true]);
        example.run(&format!(r#"update "Expenses" set "deletedAt" = now() where "id" = {expense}"#));
        example.settle();
        assert_eq!(both(example), [false, false]);
        example.run(&format!(r#"update "Expenses" set "deletedAt" = null where "id" = {expense}"#));
        example.settle();
        assert_eq!(both(example), [true, true]);
        for table in ["Tiers", "Orders", "ExpenseItems", "Transactions", "Updates", "Comments", "HostApplications"] {
            example.run(&format!(r#"update "{table}" set "deletedAt" = now() where "id" % 3 = 0"#));
        }
        example.settle();
        for table in ["Tiers", "Orders", "ExpenseItems", "Transactions", "Updates", "Comments", "HostApplications"] {
            example.run(&format!(r#"update "{table}" set "deletedAt" = null"#));
        }
        example.settle();
    });
}

#[test]
fn what_no_document_shows_enqueues_nothing() {
    let example = &mut Example::on(Engine::elasticsearch());
    let sent = "select sum(indexed + deleted)::int8 from es_sync.status";
    let before = example.number(sent);
    example.run(r#"update "Expenses" set "privateMessage" = 'the other bank account'"#);
    example.run(r#"update "ExpenseItems" set "url" = null; update "Tiers" set "name" = "name""#);
    example.settle();
    assert_eq!(example.number(sent), before);
}
