//! Called by the extension's script.

use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use crate::capture;
use crate::postgres::error::{OrRaise, Report};
use crate::postgres::rights::with_pinned_path;
use crate::postgres::spi;

/// Fails where the library was not preloaded, or the schema may hold what is somebody else's; otherwise tells the
/// launcher, once CREATE EXTENSION has committed.
#[pg_extern(sql = false)]
fn begin_install() {
    super::require_preload();
    with_pinned_path(require_own_schema).or_raise();
    capture::announce_extension_change();
}

/// CREATE EXTENSION takes a schema that is there already, whoever made it. The script looks up operators and functions in
/// it, and its owner may rename it and put another in its place, which the worker would use as a superuser.
fn require_own_schema() -> Result<(), Report> {
    let rows = spi::run(
        "select case when not o.rolsuper and o.rolname <> current_user then o.rolname::text end,
                (select pg_catalog.min(coalesce(g.rolname::text, 'PUBLIC'))
                 from pg_catalog.aclexplode(n.nspacl) a left join pg_catalog.pg_roles g on g.oid = a.grantee
                 where a.privilege_type = 'CREATE' and a.grantee <> n.nspowner),
                (select pg_catalog.min(pg_catalog.pg_describe_object(d.classid, d.objid, 0))
                 from pg_catalog.pg_depend d
                 where d.refclassid = 'pg_catalog.pg_namespace'::regclass and d.refobjid = n.oid
                   and d.classid <> 'pg_catalog.pg_extension'::regclass
                   -- This function is there by now.
                   and not exists (
                       select from pg_catalog.pg_depend m
                       join pg_catalog.pg_extension e on e.oid = m.refobjid and e.extname = 'pg_es_sync'
                       where m.classid = d.classid and m.objid = d.objid and m.deptype = 'e'
                         and m.refclassid = 'pg_catalog.pg_extension'::regclass))
         from pg_catalog.pg_namespace n join pg_catalog.pg_roles o on o.oid = n.nspowner
         where n.nspname = 'es_sync'",
        &[],
    );
    let wrong = |detail: String, hint: &str| {
        Err(Report::new(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "cannot install into a schema \"es_sync\" that others can change",
        )
        .detail(detail)
        .hint(hint))
    };
    if let Some(owner) = rows.first::<String>(1) {
        return wrong(
            format!("The schema is there already, and role \"{owner}\" owns it, who is no superuser."),
            "Drop the schema: CREATE EXTENSION makes it.",
        );
    }
    if let Some(role) = rows.first::<String>(2) {
        return wrong(
            format!("The schema is there already, and {role} may create objects in it."),
            "Use REVOKE CREATE ON SCHEMA es_sync, or drop the schema: CREATE EXTENSION makes it.",
        );
    }
    if let Some(object) = rows.first::<String>(3) {
        return wrong(
            format!("The schema is there already, and has something in it: {object}."),
            "Drop what is in the schema, or move it elsewhere.",
        );
    }
    Ok(())
}
