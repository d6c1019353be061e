//! Answers as the engines gave them, word for word (Elasticsearch 8.19.0, OpenSearch 2.19.1).

use super::*;

const ELASTICSEARCH: &str = r#"{"errors":true,"items":[{"index":{"status":201}},{"index":{"status":409,"error":{"type":"version_conflict_engine_exception","reason":"[a]: version conflict, current version [10] is higher or equal to the one provided [5]"}}},{"index":{"status":400,"error":{"type":"document_parsing_exception","reason":"[1:6] failed to parse field [n] of type [integer] in document with id 'b'. Preview of field's value: 'zwölf \"x\"'","caused_by":{"reason":"For input string: \"zwölf \"x\"\""}}}},{"index":{"status":400,"error":{"type":"strict_dynamic_mapping_exception","reason":"[1:7] mapping set to strict, dynamic introduction of [zz] within [_doc] is not allowed"}}},{"delete":{"status":404}},{"delete":{"status":409,"error":{"type":"version_conflict_engine_exception","reason":"[d]: version conflict, current version [20] is higher or equal to the one provided [15]"}}},{"delete":{"status":200}}]}"#;
const OPENSEARCH: &str = r#"{"errors":true,"items":[{"index":{"status":201}},{"index":{"status":409,"error":{"type":"version_conflict_engine_exception","reason":"[a]: version conflict, current version [10] is higher or equal to the one provided [5]"}}},{"index":{"status":400,"error":{"type":"mapper_parsing_exception","reason":"failed to parse field [n] of type [integer] in document with id 'b'. Preview of field's value: 'zwölf \"x\"'","caused_by":{"reason":"For input string: \"zwölf \"x\"\""}}}},{"index":{"status":400,"error":{"type":"strict_dynamic_mapping_exception","reason":"mapping set to strict, dynamic introduction of [zz] within [_doc] is not allowed"}}},{"delete":{"status":404}},{"delete":{"status":409,"error":{"type":"version_conflict_engine_exception","reason":"[d]: version conflict, current version [20] is higher or equal to the one provided [15]"}}},{"delete":{"status":200}}]}"#;

fn one(item: &str) -> Outcome {
    let body = format!(r#"{{"errors":true,"items":[{{"index":{item}}}]}}"#);
    read_answer(body.as_bytes(), 1).unwrap().remove(0)
}

#[test]
fn both_engines_answers_become_the_same_outcomes() {
    for (answer, kind) in [(ELASTICSEARCH, "document_parsing_exception"), (OPENSEARCH, "mapper_parsing_exception")] {
        let outcomes = read_answer(answer.as_bytes(), 7).unwrap();
        assert_eq!(outcomes[0], Outcome::Done);
        assert_eq!(outcomes[1], Outcome::Newer { version: 10 });
        match &outcomes[2] {
            Outcome::Refused { status: 400, kind: found, reason } => {
                assert_eq!(found, kind);
                assert!(
                    reason.contains("failed to parse field [n]")
                        && reason.ends_with("For input string: \"zwölf \"x\"\""),
                    "{reason}"
                );
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(&outcomes[3], Outcome::Refused { kind, .. } if kind == "strict_dynamic_mapping_exception"));
        assert_eq!(outcomes[4], Outcome::Done, "deleting what is not there is done");
        assert_eq!(outcomes[5], Outcome::Newer { version: 20 });
        assert_eq!(outcomes[6], Outcome::Done);
    }
}

#[test]
fn a_write_alias_that_is_gone_an_index_or_several_is_missing() {
    for (status, kind, reason) in [
        (
            404,
            "index_not_found_exception",
            "no such index [t.one-1] and [require_alias] request flag is [true] and [t.one-1] is not an alias",
        ),
        (404, "index_not_found_exception", "no such index [nonesuch]"),
        (
            400,
            "illegal_argument_exception",
            "no write index is defined for alias [t.one-1.write-7]. The write index may be explicitly disabled using is_write_index=false or the alias points to multiple indices without one being designated as a write index",
        ),
    ] {
        let item = format!(r#"{{"status":{status},"error":{{"type":"{kind}","reason":"{reason}"}}}}"#);
        assert_eq!(one(&item), Outcome::IndexMissing { reason: reason.into() });
    }
}

#[test]
fn what_is_not_the_documents_fault_is_tried_again() {
    for item in [
        r#"{"status":429,"error":{"type":"es_rejected_execution_exception","reason":"rejected execution of primary operation"}}"#,
        r#"{"status":429,"error":{"type":"cluster_block_exception","reason":"index [t] blocked by: [TOO_MANY_REQUESTS/12/disk usage exceeded flood-stage watermark, index has read-only-allow-delete block];"}}"#,
        r#"{"status":403,"error":{"type":"cluster_block_exception","reason":"index [t.one-1] blocked by: [FORBIDDEN/8/index write (api)];"}}"#,
        r#"{"status":503,"error":{"type":"unavailable_shards_exception","reason":"[t][0] primary shard is not active"}}"#,
        r#"{"status":400,"error":{"type":"index_closed_exception","reason":"closed"}}"#,
        r#"{"status":400,"error":{"type":"illegal_argument_exception","reason":"pipeline with id [nope] does not exist"}}"#,
        r#"{"status":500,"error":{"type":"whatever","reason":null}}"#,
        r#"{"status":503}"#,
    ] {
        assert!(matches!(one(item), Outcome::Retry { .. }), "{item}");
    }
}

#[test]
fn a_full_engine_and_an_index_that_takes_nothing_are_told_from_what_a_document_may_have_done() {
    use Cause::{Busy, Index, Unclear};
    for (item, expected) in [
        (r#"{"status":429}"#, Busy),
        (r#"{"status":429,"error":{"type":"whatever","reason":null}}"#, Busy),
        (r#"{"status":429,"error":{"type":"es_rejected_execution_exception","reason":"rejected"}}"#, Busy),
        (
            r#"{"status":429,"error":{"type":"cluster_block_exception","reason":"[t] blocked by: [12/disk usage]"}}"#,
            Index,
        ),
        (
            r#"{"status":403,"error":{"type":"cluster_block_exception","reason":"[t] blocked by: [8/index write]"}}"#,
            Index,
        ),
        (r#"{"status":503,"error":{"type":"unavailable_shards_exception","reason":"primary is not active"}}"#, Index),
        (r#"{"status":400,"error":{"type":"index_closed_exception","reason":"closed"}}"#, Index),
        (r#"{"status":403,"error":{"type":"security_exception","reason":"action is unauthorized"}}"#, Unclear),
        (r#"{"status":500,"error":{"type":"whatever","reason":null}}"#, Unclear),
        (r#"{"status":503}"#, Unclear),
    ] {
        assert!(matches!(one(item), Outcome::Retry { cause, .. } if cause == expected), "{item}: {:?}", one(item));
    }
}

#[test]
fn a_document_that_a_pipeline_fails_for_is_refused() {
    for item in [
        r#"{"status":400,"error":{"type":"illegal_argument_exception","reason":"cannot set [stamp] with parent object of type [java.lang.Integer] as part of path [doc.stamp]"}}"#,
        r#"{"status":500,"error":{"type":"fail_processor_exception","reason":"doc is no object"}}"#,
    ] {
        assert!(matches!(one(item), Outcome::Refused { .. }), "{item}");
    }
}

#[test]
fn an_id_cannot_pretend_to_be_the_version() {
    let item = r#"{"status":409,"error":{"type":"version_conflict_engine_exception","reason":"[x]: version conflict, current version [99] y]: version conflict, current version [7] is higher or equal to the one provided [5]"}}"#;
    assert_eq!(one(item), Outcome::Newer { version: 7 });
    assert_eq!(
        one(r#"{"status":409,"error":{"type":"version_conflict_engine_exception","reason":"in other words"}}"#),
        Outcome::Newer { version: 0 }
    );
}

#[test]
fn an_answer_of_another_length_is_no_answer() {
    let two = r#"{"errors":false,"items":[{"index":{"status":200}},{"index":{"status":200}}]}"#;
    assert_eq!(read_answer(two.as_bytes(), 2), Ok(vec![Outcome::Done, Outcome::Done]));
    for operations in [0, 1, 3] {
        assert_eq!(read_answer(two.as_bytes(), operations).unwrap_err().kind, FailureKind::BadAnswer);
    }
    for text in [
        "",
        "<html>",
        "[]",
        "{",
        r#"{"errors":false}"#,
        r#"{"items":[{}]}"#,
        r#"{"items":[{"index":{}}]}"#,
        r#"{"items":[{"index":{"status":200}}]} x"#,
    ] {
        assert_eq!(read_answer(text.as_bytes(), 1).unwrap_err().kind, FailureKind::BadAnswer, "{text}");
    }
}

#[test]
fn members_we_did_not_ask_for_are_skipped() {
    let full = r#"{"took":30,"errors":false,"items":[{"index":{"_index":"t","_id":"1","_version":1,"result":"created","_shards":{"total":2},"status":201}}],"ingest_took":1}"#;
    assert_eq!(read_answer(full.as_bytes(), 1), Ok(vec![Outcome::Done]));
}
