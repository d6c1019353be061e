//! The trigger functions: they note keys and nothing else.

use pgrx::pg_sys;

use super::plan::{self, Attribute, Moves, Plan, Source};
use super::transaction::{self, LONGEST};
use crate::attachment::captures::Part;
use crate::attachment::key::{Column, push_part};
use crate::attachment::{link, routing};
use crate::postgres::error::Report;
use crate::settings;

/// `es_sync.capture()`: AFTER INSERT OR UPDATE OR DELETE FOR EACH ROW, and AFTER TRUNCATE FOR EACH STATEMENT.
///
/// # Safety
/// Called by Postgres' function manager.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub unsafe extern "C-unwind" fn es_sync_capture(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: the function manager hands over a valid call; as a trigger its context is a TriggerData whose relation
    // and slots live through the call.
    unsafe {
        let context = (*call).context;
        if context.is_null() || (*context).type_ != pg_sys::NodeTag::T_TriggerData {
            Report::new(
                pgrx::PgSqlErrorCode::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
                "es_sync.capture() can only be called as a trigger",
            )
            .raise();
        }
        let trigger = &*context.cast::<pg_sys::TriggerData>();
        if !is_expected(trigger.tg_event) {
            Report::new(
                pgrx::PgSqlErrorCode::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
                "es_sync.capture() can only be called after the event",
            )
            .detail("It is called for each row of INSERT, UPDATE or DELETE, and for each statement of TRUNCATE.")
            .hint("Let es_sync.attach() create the triggers.")
            .raise();
        }
        let plan = plan::of(trigger.tg_relation);
        if !plan.sources.is_empty() {
            note(trigger, &plan);
        }
    }
    pg_sys::Datum::from(0usize)
}

/// The function manager's version mark for `es_sync_capture`.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_es_sync_capture() -> &'static pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// True for the events of our own triggers. Whoever may create one can create others: for a statement, where there are no
/// rows to look at, or before the event, where what is returned decides over the row.
fn is_expected(event: u32) -> bool {
    let row = event & pg_sys::TRIGGER_EVENT_ROW != 0;
    let truncates = event & pg_sys::TRIGGER_EVENT_OPMASK == pg_sys::TRIGGER_EVENT_TRUNCATE;
    event & pg_sys::TRIGGER_EVENT_TIMINGMASK == pg_sys::TRIGGER_EVENT_AFTER && row != truncates
}

unsafe fn note(trigger: &pg_sys::TriggerData, plan: &Plan) {
    // SAFETY: for a row event, tg_trigslot holds the old or only row, and tg_newslot the new one of an UPDATE.
    unsafe {
        match trigger.tg_event & pg_sys::TRIGGER_EVENT_OPMASK {
            pg_sys::TRIGGER_EVENT_TRUNCATE => {
                let table = (*trigger.tg_relation).rd_id.to_u32();
                for source in &plan.sources {
                    match source.part {
                        Part::Root if source.oid == table => transaction::note_whole_table(source.oid),
                        // A TRUNCATE of the whole table fires the root's trigger too.
                        Part::Root => transaction::note_part_emptied(source.oid),
                        // The documents are still there, and look different.
                        Part::Related { .. } => transaction::note_unnoted(source.oid),
                    }
                }
            }
            _ if !settings::capture() => {
                for source in &plan.sources {
                    transaction::note_unnoted(source.oid);
                }
            }
            pg_sys::TRIGGER_EVENT_UPDATE => {
                let old = Row::new(trigger.tg_trigslot, plan.attributes);
                let new = Row::new(trigger.tg_newslot, plan.attributes);
                for source in &plan.sources {
                    note_update(source, &old, &new);
                }
                for moves in &plan.moves {
                    if moves.routing.is_none() || !moves.used.iter().all(|attribute| old.same(&new, *attribute)) {
                        note_former(moves, &old);
                    }
                }
            }
            event => {
                let row = Row::new(trigger.tg_trigslot, plan.key_attributes);
                for source in &plan.sources {
                    note_row(source, &row);
                }
                if event == pg_sys::TRIGGER_EVENT_DELETE {
                    for moves in &plan.moves {
                        note_former(moves, &row);
                    }
                }
            }
        }
    }
}

unsafe fn note_update(source: &Source, old: &Row, new: &Row) {
    // SAFETY: both rows have the plan's attributes.
    unsafe {
        if let Some(used) = &source.used
            && used.iter().all(|attribute| old.same(new, *attribute))
        {
            return;
        }
        note_row(source, new);
        let key_stays = source.key.iter().all(|(place, column)| match column.integer(new.value(*place)) {
            Some(integer) => {
                column.integer(old.value(*place)) == Some(integer) && old.is_null(*place) == new.is_null(*place)
            }
            None => false,
        });
        if !key_stays {
            note_row(source, old);
        }
    }
}

unsafe fn note_row(source: &Source, row: &Row) {
    // SAFETY: what is read is not null, and each value is read by the column made for its type.
    unsafe {
        if source.key.is_empty() {
            transaction::note_unnoted(source.oid);
            return;
        }
        let is_link = link::is_link(source.oid);
        let has_null = row.has_null(&source.key);
        if has_null && !(is_link && source.part == Part::Related { nulls: true }) {
            // It equals nothing, and no document has it for its key.
            return;
        }
        if is_link && (has_null || !is_integer(source)) {
            return note_values(source, row);
        }
        if let [(place, column)] = source.key[..]
            && let Some(integer) = column.integer(row.value(place))
        {
            transaction::note_integer(source.oid, integer);
            return;
        }
        note_text(source.oid, |key, part| key_text(&source.key, row, key, part));
    }
}

/// Notes the text that `make` puts into the first of two buffers, unless it says that a part of it is too long.
fn note_text(source: u32, make: impl FnOnce(&mut String, &mut String) -> bool) {
    transaction::with_buffer(|text, part| match make(text, part) {
        true => transaction::note_key(source, text),
        false => transaction::note_unnoted(source),
    });
}

/// Appends the text of a key to `key`; `part` is a buffer. False where a part of it is too long.
unsafe fn key_text(columns: &[(usize, Column)], row: &Row, key: &mut String, part: &mut String) -> bool {
    // SAFETY: as in `note_row`.
    unsafe {
        columns.iter().enumerate().all(|(index, (place, column))| {
            if columns.len() == 1 {
                return column.text_within(LONGEST, row.value(*place), key);
            }
            part.clear();
            let fits = column.text_within(LONGEST, row.value(*place), part);
            push_part(key, index == 0, part);
            fits
        })
    }
}

/// Notes where the row's document lay.
unsafe fn note_former(moves: &Moves, row: &Row) {
    let Some((place, column)) = moves.routing else {
        transaction::note_unnoted(moves.oid);
        return;
    };
    // SAFETY: as in `note_row`; the plan's attributes hold key and routing.
    unsafe {
        if row.has_null(&moves.key) {
            // It has no document.
            return;
        }
        note_text(moves.oid, |noted, part| {
            let mut key = String::new();
            let mut fits = key_text(&moves.key, row, &mut key, part);
            part.clear();
            fits &= row.is_null(place) || column.text_within(LONGEST, row.value(place), part);
            routing::push(noted, &key, (!part.is_empty()).then_some(part.as_str()));
            fits
        });
    }
}

fn is_integer(source: &Source) -> bool {
    matches!(source.key[..], [(_, column)] if column.is_integer())
}

/// Notes the values of a link's columns.
unsafe fn note_values(source: &Source, row: &Row) {
    // SAFETY: as in `note_row`.
    unsafe {
        note_text(source.oid, |values, part| {
            source.key.iter().enumerate().all(|(index, (place, column))| {
                part.clear();
                let is_null = row.is_null(*place);
                let fits = is_null || column.text_within(LONGEST, row.value(*place), part);
                link::push_value(values, index == 0, (!is_null).then_some(part.as_str()));
                fits
            })
        });
    }
}

unsafe extern "C-unwind" {
    // Declared anew because pgrx guards each of its calls against an ERROR with sigsetjmp; this one raises none for
    // attributes that the descriptor has, and runs for every changed row.
    fn slot_getsomeattrs_int(slot: *mut pg_sys::TupleTableSlot, attributes: std::ffi::c_int);
}

/// A row whose first attributes are taken apart.
struct Row {
    slot: *mut pg_sys::TupleTableSlot,
}

impl Row {
    unsafe fn new(slot: *mut pg_sys::TupleTableSlot, attributes: i32) -> Self {
        // SAFETY: the slot holds a tuple; taking it apart once serves all sources and other triggers.
        unsafe {
            if i32::from((*slot).tts_nvalid) < attributes {
                slot_getsomeattrs_int(slot, attributes);
            }
        }
        Self { slot }
    }

    unsafe fn value(&self, place: usize) -> pg_sys::Datum {
        // SAFETY: `place` is below the attributes taken apart.
        unsafe { *(*self.slot).tts_values.add(place) }
    }

    unsafe fn is_null(&self, place: usize) -> bool {
        // SAFETY: as above.
        unsafe { *(*self.slot).tts_isnull.add(place) }
    }

    /// True if one of these columns is null.
    unsafe fn has_null(&self, columns: &[(usize, Column)]) -> bool {
        // SAFETY: as above.
        columns.iter().any(|(place, _)| unsafe { self.is_null(*place) })
    }

    /// True if the column has the same image in both rows. A value that was stored anew out of line counts as changed.
    unsafe fn same(&self, other: &Row, attribute: Attribute) -> bool {
        // SAFETY: both values are of the attribute's type and not null when compared.
        unsafe {
            let place = attribute.place;
            match (self.is_null(place), other.is_null(place)) {
                (true, true) => return true,
                (false, false) => {}
                _ => return false,
            }
            let (mine, its) = (self.value(place), other.value(place));
            if attribute.by_value {
                return mine.value() == its.value();
            }
            let (mine, its) = (mine.cast_mut_ptr::<u8>(), its.cast_mut_ptr::<u8>());
            let size = |pointer: *mut u8| match attribute.length {
                -1 => pgrx::varsize_any(pointer.cast()),
                -2 => std::ffi::CStr::from_ptr(pointer.cast()).count_bytes(),
                fixed => fixed as usize,
            };
            let length = size(mine);
            length == size(its) && std::slice::from_raw_parts(mine, length) == std::slice::from_raw_parts(its, length)
        }
    }
}
