//! SPI without detours: kept plans, rows read in place, cursors.
//!
//! pgrx's own client copies and checks more than the delivery loop can afford: here a document's values are read where
//! the executor has them.

use std::ffi::{CStr, CString};

use pgrx::{FromDatum, IntoDatum, PgSqlErrorCode, pg_sys, varlena};

use super::error::Report;

/// Opens SPI. An error in between closes it with the transaction.
pub fn connect() {
    // SAFETY: called inside a transaction.
    unsafe { pg_sys::SPI_connect() };
}

/// Closes SPI; everything that `Rows` pointed to is freed.
pub fn finish() {
    // SAFETY: paired with `connect`.
    unsafe { pg_sys::SPI_finish() };
}

/// A value for a parameter: its datum, or null.
pub type Value = Option<pg_sys::Datum>;

/// Turns a Rust value into a parameter.
pub fn value(value: impl IntoDatum) -> Value {
    value.into_datum()
}

/// A parameter of a statement that is planned where it is run: its type, and its value.
pub type Parameter = (pg_sys::Oid, Value);

/// Turns a Rust value, or an Option of one, into a parameter of the type that is its own in Postgres.
pub fn parameter<T: IntoDatum>(value: T) -> Parameter {
    (T::type_oid(), value.into_datum())
}

/// A prepared statement that outlives its transaction. Postgres plans it again when what it uses changes.
pub struct Plan {
    plan: pg_sys::SPIPlanPtr,
    types: Vec<pg_sys::Oid>,
}

impl Plan {
    /// Prepares `sql` with parameters of the given types. SPI must be connected.
    pub fn prepare(sql: &str, types: &[pg_sys::Oid]) -> Self {
        let text = c_string(sql);
        let mut types = types.to_vec();
        // SAFETY: SPI is connected; text and types live through the call; keeping moves the plan to a context that
        // lasts until SPI_freeplan.
        let plan = unsafe {
            let plan = pg_sys::SPI_prepare(text.as_ptr(), types.len() as i32, types.as_mut_ptr());
            if plan.is_null() {
                let code = pg_sys::SPI_result;
                pgrx::error!("could not prepare a statement: SPI error {code}");
            }
            pg_sys::SPI_keepplan(plan);
            plan
        };
        Self { plan, types }
    }

    /// Takes the locks that running it takes, until the transaction ends.
    pub fn lock(&self) {
        // SAFETY: the plan was kept and SPI is connected; Postgres' plan is given back to the owner that it was taken for.
        unsafe {
            let plan = pg_sys::SPI_plan_get_cached_plan(self.plan);
            if !plan.is_null() {
                pg_sys::ReleaseCachedPlan(plan, pg_sys::CurrentResourceOwner);
            }
        }
    }

    /// Runs it, in a snapshot of its own that is taken after its locks; `limit` rows at the most, 0 for all.
    pub fn execute(&self, values: &[Value], limit: i64) -> Rows {
        let (mut datums, nulls) = split(values);
        // SAFETY: the plan was kept, SPI is connected, and there is a value for each parameter.
        unsafe {
            let code =
                pg_sys::SPI_execute_plan(self.plan, datums.as_mut_ptr(), nulls.as_ptr().cast(), false, limit as _);
            Rows::taken(code)
        }
    }

    /// Runs it in the active snapshot, which `lock` should have come before, and hands over row by row, until `take` returns
    /// false. Raises where its columns are not of these types, as `Rows::typed` does.
    ///
    /// Returns true if all rows were taken.
    pub fn each(&self, values: &[Value], types: &[pg_sys::Oid], mut take: impl FnMut(&Slot) -> bool) -> bool {
        // SAFETY: the new context goes with the current one, or below.
        let scratch = unsafe {
            pg_sys::AllocSetContextCreateExtended(
                pg_sys::CurrentMemoryContext,
                c"es_sync row".as_ptr(),
                pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
                pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
                pg_sys::ALLOCSET_DEFAULT_MAXSIZE as usize,
            )
        };
        let mut receiver = Receiver {
            base: pg_sys::DestReceiver {
                receiveSlot: Some(receive),
                rStartup: Some(started),
                rShutdown: Some(ended),
                rDestroy: Some(ended),
                mydest: pg_sys::CommandDest::DestNone,
            },
            types,
            scratch,
            take: &mut take,
            stopped: false,
        };
        // SAFETY: as in `execute`; list, options and receiver outlive the call, which does not keep them.
        unsafe {
            let parameters = pg_sys::makeParamList(values.len() as i32);
            let slots = (*parameters).params.as_mut_slice(values.len());
            for ((slot, value), kind) in slots.iter_mut().zip(values).zip(&self.types) {
                *slot = pg_sys::ParamExternData {
                    value: value.unwrap_or(pg_sys::Datum::from(0usize)),
                    isnull: value.is_none(),
                    pflags: pg_sys::PARAM_FLAG_CONST as u16,
                    ptype: *kind,
                };
            }
            let options = pg_sys::SPIExecuteOptions {
                params: parameters,
                read_only: true,
                dest: (&raw mut receiver).cast(),
                ..Default::default()
            };
            let code = pg_sys::SPI_execute_plan_extended(self.plan, &options);
            if code < 0 {
                pgrx::error!("could not run a statement: SPI error {code}");
            }
            pg_sys::pfree(parameters.cast());
            pg_sys::MemoryContextDelete(scratch);
        }
        !receiver.stopped
    }

    /// Opens a cursor on it, so that large rows can be taken a few at a time.
    pub fn open(&self, values: &[Value]) -> Cursor {
        let (mut datums, nulls) = split(values);
        // SAFETY: as in `execute`.
        let portal = unsafe {
            pg_sys::SPI_cursor_open(std::ptr::null(), self.plan, datums.as_mut_ptr(), nulls.as_ptr().cast(), true)
        };
        Cursor { portal }
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the plan was kept by `prepare` and is freed once.
        unsafe { pg_sys::SPI_freeplan(self.plan) };
    }
}

/// A row that the executor has just made. Nothing of it lasts.
pub struct Slot<'a> {
    values: &'a [pg_sys::Datum],
    nulls: &'a [bool],
}

impl Slot<'_> {
    /// The datum in `column` (from 1); None for null.
    pub fn datum(&self, column: usize) -> Option<pg_sys::Datum> {
        (!self.nulls[column - 1]).then(|| self.values[column - 1])
    }
}

/// Where the executor sends rows. It sees the first part only.
#[repr(C)]
struct Receiver<'a> {
    base: pg_sys::DestReceiver,
    types: &'a [pg_sys::Oid],
    /// What Postgres' functions leave behind when a value is looked at; emptied after each row.
    scratch: pg_sys::MemoryContext,
    take: &'a mut dyn FnMut(&Slot) -> bool,
    stopped: bool,
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn receive(slot: *mut pg_sys::TupleTableSlot, receiver: *mut pg_sys::DestReceiver) -> bool {
    // SAFETY: the executor passes the receiver that `each` gave it, and a slot with a row; its arrays are as long as its
    // descriptor says once the values are taken out of the tuple.
    unsafe {
        let receiver = &mut *receiver.cast::<Receiver>();
        let columns = (*(*slot).tts_tupleDescriptor).natts;
        if i32::from((*slot).tts_nvalid) < columns {
            pg_sys::slot_getsomeattrs_int(slot, columns);
        }
        let row = Slot {
            values: std::slice::from_raw_parts((*slot).tts_values, columns as usize),
            nulls: std::slice::from_raw_parts((*slot).tts_isnull, columns as usize),
        };
        let context = pg_sys::MemoryContextSwitchTo(receiver.scratch);
        receiver.stopped = !(receiver.take)(&row);
        pg_sys::MemoryContextSwitchTo(context);
        pg_sys::MemoryContextReset(receiver.scratch);
        !receiver.stopped
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn started(receiver: *mut pg_sys::DestReceiver, _operation: i32, columns: pg_sys::TupleDesc) {
    // SAFETY: as in `receive`; the descriptor is that of the rows to come.
    unsafe { require_types(columns, (*receiver.cast::<Receiver>()).types) };
}

unsafe extern "C-unwind" fn ended(_: *mut pg_sys::DestReceiver) {}

/// An open cursor; `close` it before the transaction ends, or let the transaction's end do it.
pub struct Cursor {
    portal: pg_sys::Portal,
}

impl Cursor {
    /// Takes the next `count` rows; fewer mean that there are no more.
    pub fn fetch(&self, count: i64) -> Rows {
        // SAFETY: the portal is open and SPI connected.
        unsafe {
            pg_sys::SPI_cursor_fetch(self.portal, true, count as _);
            Rows::taken(pg_sys::SPI_OK_FETCH as i32)
        }
    }

    pub fn close(self) {
        // SAFETY: the portal is open.
        unsafe { pg_sys::SPI_cursor_close(self.portal) };
    }
}

/// Runs a statement once.
pub fn run(sql: &str, parameters: &[Parameter]) -> Rows {
    let text = c_string(sql);
    let mut types: Vec<_> = parameters.iter().map(|(oid, _)| *oid).collect();
    let values: Vec<_> = parameters.iter().map(|(_, value)| *value).collect();
    let (mut datums, nulls) = split(&values);
    // SAFETY: SPI is connected and there are as many types as values.
    unsafe {
        let code = pg_sys::SPI_execute_with_args(
            text.as_ptr(),
            types.len() as i32,
            types.as_mut_ptr(),
            datums.as_mut_ptr(),
            nulls.as_ptr().cast(),
            false,
            0,
        );
        Rows::taken(code)
    }
}

/// The rows of the last statement. They live until `free` or the end of SPI.
pub struct Rows {
    table: *mut pg_sys::SPITupleTable,
    count: usize,
}

impl Rows {
    /// # Safety
    /// Right after an SPI call that returned `code`.
    unsafe fn taken(code: i32) -> Self {
        if code < 0 {
            pgrx::error!("could not run a statement: SPI error {code}");
        }
        // SAFETY: SPI sets both for the call that just returned.
        unsafe { Self { table: pg_sys::SPI_tuptable, count: pg_sys::SPI_processed as usize } }
    }

    /// The same rows. Raises where their columns are not of these types, which somebody has read from the catalog: a table
    /// may have been altered since, while its statement waited for the lock. A datum of another type must not be touched.
    pub fn typed(self, types: &[pg_sys::Oid]) -> Self {
        if !self.table.is_null() {
            // SAFETY: the table came from SPI, with the descriptor of its rows.
            unsafe { require_types((*self.table).tupdesc, types) };
        }
        self
    }

    /// How many rows were returned or affected.
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The datum in `row` (from 0) and `column` (from 1); None for null.
    pub fn datum(&self, row: usize, column: usize) -> Option<pg_sys::Datum> {
        assert!(row < self.count && !self.table.is_null());
        let mut null = false;
        // SAFETY: the row exists, and SPI_getbinval checks the column.
        let datum = unsafe {
            let tuple = *(*self.table).vals.add(row);
            pg_sys::SPI_getbinval(tuple, (*self.table).tupdesc, column as i32, &mut null)
        };
        (!null).then_some(datum)
    }

    /// The value in `row` (from 0) and `column` (from 1). The type must be the column's.
    pub fn get<T: FromDatum>(&self, row: usize, column: usize) -> Option<T> {
        let datum = self.datum(row, column)?;
        // SAFETY: the statement's author pairs T with the column's type.
        unsafe { T::from_datum(datum, false) }
    }

    /// The value in the first row and `column` (from 1); None where there is no row, too.
    pub fn first<T: FromDatum>(&self, column: usize) -> Option<T> {
        if self.is_empty() { None } else { self.get(0, column) }
    }

    /// Frees the rows before SPI is closed.
    pub fn free(self) {
        // SAFETY: the table came from SPI and is not used again.
        unsafe { pg_sys::SPI_freetuptable(self.table) };
    }
}

/// # Safety
/// `columns` is valid.
unsafe fn require_types(columns: pg_sys::TupleDesc, types: &[pg_sys::Oid]) {
    // SAFETY: a descriptor has `natts` attributes.
    let columns = unsafe { (*columns).attrs.as_slice((*columns).natts as usize) };
    if !columns.iter().map(|column| column.atttypid).eq(types.iter().copied()) {
        Report::new(PgSqlErrorCode::ERRCODE_OBJECT_IN_USE, "could not read a table that is being altered")
            .detail("The type of a column has changed since the statement was made.")
            .hint("Try again.")
            .raise();
    }
}

/// Calls `use_bytes` with the bytes of a text, json or bytea value, read in place unless it is toasted.
///
/// # Safety
/// `datum` is a non-null varlena.
pub unsafe fn with_bytes<R>(datum: pg_sys::Datum, use_bytes: impl FnOnce(&[u8]) -> R) -> R {
    // SAFETY: the caller's; a detoasted copy is freed after its use.
    unsafe {
        let original = datum.cast_mut_ptr::<pg_sys::varlena>();
        // Asking Postgres costs more than looking.
        if !varlena::varatt_is_4b_c(original) && !varlena::varatt_is_1b_e(original) {
            return use_bytes(varlena::varlena_to_byte_slice(original));
        }
        let plain = pg_sys::pg_detoast_datum_packed(original);
        let result = use_bytes(varlena::varlena_to_byte_slice(plain));
        pg_sys::pfree(plain.cast());
        result
    }
}

/// Bytes that a value has when it is neither compressed nor out of line, its header included, found without fetching it.
///
/// # Safety
/// `datum` is a non-null varlena.
pub unsafe fn raw_bytes(datum: pg_sys::Datum) -> usize {
    // SAFETY: the caller's.
    unsafe {
        let original = datum.cast_mut_ptr::<pg_sys::varlena>();
        if !varlena::varatt_is_4b_c(original) && !varlena::varatt_is_1b_e(original) {
            return varlena::varsize_any(original);
        }
        pg_sys::toast_raw_datum_size(datum)
    }
}

/// Integers as a parameter of type int8[].
pub fn integers(values: &[i64]) -> Value {
    let mut datums: Vec<pg_sys::Datum> = values.iter().map(|value| pg_sys::Datum::from(*value)).collect();
    // SAFETY: int8 has eight bytes, is passed by value and aligned to eight (pg_type).
    let array = unsafe {
        let (length, by_value, alignment) = (8, true, b'd' as std::ffi::c_char);
        let count = datums.len() as i32;
        pg_sys::construct_array(datums.as_mut_ptr(), count, pg_sys::INT8OID, length, by_value, alignment)
    };
    Some(pg_sys::Datum::from(array))
}

/// A relation's name, schema-qualified and quoted.
pub fn qualified(relation: pg_sys::Oid) -> String {
    // SAFETY: syscache lookups in a live transaction; the palloc'd results are copied.
    unsafe {
        let schema = pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relation));
        let name = pg_sys::get_rel_name(relation);
        if schema.is_null() || name.is_null() {
            return relation.to_u32().to_string();
        }
        let quoted = pg_sys::quote_qualified_identifier(schema, name);
        CStr::from_ptr(quoted).to_string_lossy().into_owned()
    }
}

/// A name as an identifier of SQL.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn split(values: &[Value]) -> (Vec<pg_sys::Datum>, Vec<u8>) {
    let datums = values.iter().map(|value| value.unwrap_or(pg_sys::Datum::from(0usize))).collect();
    let mut nulls: Vec<u8> = values.iter().map(|value| if value.is_some() { b' ' } else { b'n' }).collect();
    nulls.push(0);
    (datums, nulls)
}

fn c_string(text: &str) -> CString {
    CString::new(text).unwrap_or_else(|_| pgrx::error!("a statement holds a NUL byte"))
}
