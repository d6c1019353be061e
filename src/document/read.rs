//! Reading documents: by keys, or page by page in the order of the key.

use std::rc::Rc;

use pgrx::pg_sys;
use serde_json::json;

use super::pieces::{self, Piece};
use super::shape::{Dialect, Shape};
use crate::attachment::catalog::Attachment;
use crate::attachment::key;
use crate::postgres::error::SqlError;
use crate::postgres::limit::within_read_timeout;
use crate::postgres::rights;
use crate::postgres::spi::{self, Plan, Slot, Value};
use crate::postgres::transaction::{self, Scope};

/// Reads one attachment's documents. Its statements stay prepared; make it anew when the attachment changes.
pub struct Reader {
    shape: Shape,
    by_keys: Option<Plan>,
    by_range: Option<Plan>,
    first_page: Option<Plan>,
    next_page: Option<Plan>,
    mapping: Option<Rc<str>>,
    /// The statements name nothing that is missing: as of the last `lock`.
    is_analysed: bool,
}

/// A row as it was read.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    pub key: &'a str,
    /// Where its document lies; None where that depends on its id alone.
    pub routing: Option<&'a str>,
    /// One line of JSON; None if the row has no document.
    pub document: Option<&'a [u8]>,
}

impl Reader {
    pub fn new(shape: Shape) -> Self {
        Self {
            shape,
            by_keys: None,
            by_range: None,
            first_page: None,
            next_page: None,
            mapping: None,
            is_analysed: false,
        }
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The fields that an index needs for these documents, as the body of a request.
    pub fn mapping(&mut self, attachment: &Attachment, dialect: Dialect) -> Rc<str> {
        let Self { shape, mapping, .. } = self;
        mapping
            .get_or_insert_with(|| {
                let properties = shape.mappings(attachment, dialect, false)["properties"].take();
                json!({ "properties": properties }).to_string().into()
            })
            .clone()
    }

    /// Reads the rows of `keys` that exist, as they are in the active snapshot. `found` says whether to go on; it may get
    /// rows of other keys, too, that read alike (1.00 for 1.0, 7 for 007).
    ///
    /// Returns true if all rows were read: a key that was not found then has no document.
    pub fn by_keys(&mut self, keys: &[&str], mut found: impl FnMut(Row) -> bool) -> bool {
        let Self { shape, by_keys, by_range, .. } = self;
        // A text that is no key of this table has no row, and so no document.
        if shape.has_integer_key() {
            let mut integers: Vec<i64> = keys.iter().filter_map(|key| key.parse().ok()).collect();
            // Neighbours in the index one after the other: it is searched with what the processor has at hand.
            integers.sort_unstable();
            integers.dedup();
            let pieces = pieces::cut(&integers, !shape.statements.is_plain);
            return as_reader(shape, || {
                pieces.iter().all(|piece| match piece.is_range {
                    true => read_range(plan_by_range(by_range, shape), piece, shape, &mut found),
                    false => read(plan_by_keys(by_keys, shape), &[spi::integers(piece.keys)], shape, &mut found),
                })
            });
        }
        let columns = shape.key.len();
        let mut values: Vec<Vec<String>> = vec![Vec::with_capacity(keys.len()); columns];
        for key in keys {
            for (column, part) in values.iter_mut().zip(key::parts(key, columns).into_iter().flatten()) {
                column.push(part);
            }
        }
        let values: Vec<Value> = values.into_iter().map(spi::value).collect();
        as_reader(shape, || read(plan_by_keys(by_keys, shape), &values, shape, found))
    }

    /// Takes the locks that reading takes, by keys or pages, until the transaction ends; then renews the snapshot, which
    /// so sees what those have done who held them. To an older one, a table is empty that ALTER TABLE has written anew.
    /// To be called before either: they read in the active snapshot.
    pub fn lock(&mut self) {
        self.is_analysed = false;
        let Self { shape, by_keys, .. } = self;
        as_reader(shape, || plan_by_keys(by_keys, shape).lock());
        self.is_analysed = true;
        transaction::new_snapshot();
    }

    /// True if a row's own values made reading fail, which `lock` came before, and other rows can be read.
    pub fn blames_a_row(&self, error: &SqlError) -> bool {
        self.is_analysed && (error.is_in_the_data() || error.is_of_a_name())
    }

    /// Reads at the most `limit` rows that follow the key `after`, in the order of the key. `found` as in `by_keys`.
    ///
    /// Returns true if it was not stopped by `found`.
    pub fn page(&mut self, after: Option<&str>, limit: i64, found: impl FnMut(Row) -> bool) -> bool {
        let columns = self.shape.key.len();
        let parts = after.and_then(|after| key::parts(after, columns));
        let Self { shape, first_page, next_page, .. } = self;
        as_reader(shape, || match parts {
            None => {
                let plan =
                    first_page.get_or_insert_with(|| Plan::prepare(&shape.statements.first_page, &[pg_sys::INT8OID]));
                read(plan, &[spi::value(limit)], shape, found)
            }
            Some(parts) => {
                let plan = next_page.get_or_insert_with(|| {
                    let mut types = vec![pg_sys::TEXTOID; columns];
                    types.push(pg_sys::INT8OID);
                    Plan::prepare(&shape.statements.next_page, &types)
                });
                let mut values: Vec<Value> = parts.into_iter().map(spi::value).collect();
                values.push(spi::value(limit));
                read(plan, &values, shape, found)
            }
        })
    }

    /// True if a row could have this key: its parts are values of the key columns' types.
    ///
    /// # Errors
    /// What Postgres said, unless that is about the key.
    pub fn is_key(&self, text: &str) -> Result<bool, SqlError> {
        let Some(parts) = key::parts(text, self.shape.key.len()) else { return Ok(false) };
        let parts: Vec<_> = parts.into_iter().map(spi::parameter).collect();
        // The type may be a domain, whose check runs its owner's functions.
        let run = || spi::run(&self.shape.statements.key_check, &parts).len();
        let check = || rights::as_owner(self.shape.owner, || within_read_timeout(run));
        match transaction::run(check) {
            Ok(_) => Ok(true),
            Err(error) if error.refuses_a_value() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The key of the row that follows `after`, without its document: for a row that cannot be read.
    pub fn next_key(&mut self, after: Option<&str>) -> Option<String> {
        let shape = &self.shape;
        let parts = after.and_then(|after| key::parts(after, shape.key.len()));
        let key_types = &shape.columns[..shape.key.len()];
        rights::as_owner(shape.owner, || {
            let statement = if parts.is_some() { &shape.statements.next_key } else { &shape.statements.first_key };
            let parameters: Vec<_> = parts.into_iter().flatten().map(spi::parameter).collect();
            let rows = spi::run(statement, &parameters).typed(key_types);
            let mut text = String::new();
            (!rows.is_empty()).then(|| {
                key_of(|column| rows.datum(0, column), &shape.key, &mut text);
                text
            })
        })
    }
}

/// As the table's owner, and not longer than `es_sync.read_timeout`. A table is read by its key's index, whatever its
/// statistics say.
fn as_reader<T>(shape: &Shape, work: impl FnOnce() -> T) -> T {
    rights::as_owner(shape.owner, || {
        if !shape.is_view {
            transaction::set(c"enable_seqscan", c"off", Scope::Nested);
        }
        within_read_timeout(work)
    })
}

fn plan_by_keys<'a>(plan: &'a mut Option<Plan>, shape: &Shape) -> &'a Plan {
    plan.get_or_insert_with(|| {
        let kind = if shape.has_integer_key() { pg_sys::INT8ARRAYOID } else { pg_sys::TEXTARRAYOID };
        Plan::prepare(&shape.statements.by_keys, &vec![kind; shape.key.len()])
    })
}

fn plan_by_range<'a>(plan: &'a mut Option<Plan>, shape: &Shape) -> &'a Plan {
    plan.get_or_insert_with(|| Plan::prepare(&shape.statements.by_range, &[pg_sys::INT8OID; 2]))
}

/// Reads the rows of a range that were asked for.
fn read_range(plan: &Plan, piece: &Piece, shape: &Shape, found: impl FnMut(Row) -> bool) -> bool {
    let values = piece.ends().map(spi::value);
    let asked_for =
        |row: &Slot| row.datum(1).and_then(|key| shape.key[0].integer(key)).is_some_and(|key| piece.contains(key));
    read_those(plan, &values, shape, asked_for, found)
}

fn read(plan: &Plan, values: &[Value], shape: &Shape, found: impl FnMut(Row) -> bool) -> bool {
    read_those(plan, values, shape, |_| true, found)
}

/// Reads rows; those that are not `wanted` are passed over.
fn read_those(
    plan: &Plan,
    values: &[Value],
    shape: &Shape,
    wanted: impl Fn(&Slot) -> bool,
    mut found: impl FnMut(Row) -> bool,
) -> bool {
    let columns = shape.key.len();
    let first = columns + 1 + usize::from(shape.routing.is_some());
    let (mut text, mut routing, mut document) = (String::new(), String::new(), Vec::new());
    plan.each(values, &shape.columns, |row| {
        if !wanted(row) {
            return true;
        }
        key_of(|column| row.datum(column), &shape.key, &mut text);
        if let Some(column) = shape.routing {
            routing.clear();
            if let Some(datum) = row.datum(columns + 1) {
                // SAFETY: the statement returns the routing behind the key columns.
                unsafe { column.text(datum, &mut routing) };
            }
        }
        document.clear();
        let document = shape.template.write(row, first, &mut document).then_some(&document[..]);
        // The engine takes an empty routing for none.
        found(Row { key: &text, routing: (!routing.is_empty()).then_some(&routing), document })
    })
}

pub(super) fn key_of(datum: impl Fn(usize) -> Option<pg_sys::Datum>, columns: &[key::Column], text: &mut String) {
    text.clear();
    if let [column] = columns {
        if let Some(datum) = datum(1) {
            // SAFETY: the statement returns the key columns first, in the order of `columns`.
            unsafe { column.text(datum, text) };
        }
        return;
    }
    let mut part = String::new();
    for (index, column) in columns.iter().enumerate() {
        part.clear();
        if let Some(datum) = datum(index + 1) {
            // SAFETY: as above.
            unsafe { column.text(datum, &mut part) };
        }
        key::push_part(text, index == 0, &part);
    }
}
