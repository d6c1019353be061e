//! What of a failure may be shown to everybody who watches: in the log, the status, the health.
//!
//! An engine's reason quotes the document that it is about, in ever new words. So of a single document's failure only
//! what is known to be harmless is taken over; the whole reason is for those who may read the table.

/// Longest text shown, in characters.
const MAX_SHOWN: usize = 200;

/// Where a reason begins to quote a document or its id.
const QUOTES: [&str; 4] = ["Preview of field's value", " in document with id", "For input string", "Source: "];

/// A failure of a single document: the engine's error type, and the field where it names one.
pub fn document_failure(kind: &str, reason: &str) -> String {
    const BEFORE: &str = "failed to parse field [";
    let field = reason.find(BEFORE).and_then(|at| reason[at + BEFORE.len()..].split_once(']'));
    let text = match field {
        Some((field, _)) => format!("{kind}, field \"{field}\""),
        None => kind.to_owned(),
    };
    shortened(&text)
}

/// A failure of a request, an index or the engine: cut before it quotes a document.
pub fn request_failure(reason: &str) -> String {
    let end = QUOTES.iter().filter_map(|quote| reason.find(quote)).min().unwrap_or(reason.len());
    shortened(reason[..end].trim_end())
}

fn shortened(text: &str) -> String {
    text.chars().take(MAX_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "4111-1111";

    #[test]
    fn a_refused_document_is_told_by_type_and_field_alone() {
        let reason = format!(
            "[1:19] failed to parse field [card] of type [integer] in document with id '{SECRET}'. Preview of field's \
             value: '{SECRET}': For input string: \"{SECRET}\""
        );
        assert_eq!(
            document_failure("document_parsing_exception", &reason),
            "document_parsing_exception, field \"card\""
        );
        for reason in [
            format!("failed to parse date field [{SECRET}] with format [strict_date]"),
            format!("Numeric value ({SECRET}) out of range of int"),
            format!("'{SECRET}' is not an IP string literal."),
        ] {
            assert_eq!(document_failure("mapper_parsing_exception", &reason), "mapper_parsing_exception");
        }
    }

    #[test]
    fn an_index_block_is_told_in_full_and_a_quoted_document_is_not() {
        let block = "cluster_block_exception: index [orders-1] blocked by: [FORBIDDEN/8/index write (api)];";
        assert_eq!(request_failure(block), block);
        let quoting = format!("exception: no luck. Preview of field's value: '{SECRET}'");
        assert_eq!(request_failure(&quoting), "exception: no luck.");
        assert_eq!(request_failure(&"ö".repeat(900)).chars().count(), MAX_SHOWN);
    }
}
