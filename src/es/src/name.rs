//! What an index may be called, and how names go into paths.

use crate::failure::{Failure, FailureKind};
use crate::lease::{LEASE_INDEX, is_write_alias};

/// Leaves room for what pg_es_sync appends ("-12", a write alias' suffix) within the engine's 255.
const MAX_BYTES: usize = 200;

/// Checks Elasticsearch's rules for index names (MetadataCreateIndexService.validateIndexOrAliasName);
/// OpenSearch has the same. The error is the rule that is broken, as "must be lower-case".
pub fn check_index_name(name: &str) -> Result<(), String> {
    let broken = |rule: &str| Err(rule.to_owned());
    if name.is_empty() {
        return broken("is empty");
    }
    if name.len() > MAX_BYTES {
        return broken(&format!("is longer than {MAX_BYTES} bytes"));
    }
    if name == "." || name == ".." {
        return broken("must not be \".\" or \"..\"");
    }
    if name.starts_with(['-', '_', '+']) {
        return broken("must not begin with \"-\", \"_\" or \"+\"");
    }
    if let Some(found) = name.chars().find(|c| "\\/*?\"<>| ,#:;".contains(*c) || c.is_control()) {
        return broken(&format!("must not contain {found:?}"));
    }
    if name.to_lowercase() != name {
        return broken("must be lower-case");
    }
    // Ours, and so perhaps another attachment's.
    if name == LEASE_INDEX || is_write_alias(name) {
        return broken("is kept for pg_es_sync itself");
    }
    Ok(())
}

/// A name for use in a path, percent-encoded.
///
/// Refuses what the engine would read as a pattern, a list or nothing: `DELETE /a,*` deletes far more than one index,
/// and the engine decodes the percent signs before it splits.
pub(crate) fn path_name(name: &str) -> Result<String, Failure> {
    let pattern = name.is_empty()
        || name == "_all"
        || name.starts_with('-')
        || name.contains(['*', '?', ',', '<', '>', '/', '\\']);
    if pattern {
        return Err(Failure::new(FailureKind::Config, format!("\"{name}\" is not the name of one index or alias")));
    }
    Ok(percent_encode(name))
}

/// Encodes everything but RFC 3986's unreserved characters.
pub(crate) fn percent_encode(text: &str) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push('%');
            encoded.push(char::from(HEX[usize::from(byte >> 4)]));
            encoded.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_names_pass() {
        let long = "x".repeat(200);
        for name in ["orders", "public.orders", "a-1_b+c", ".hidden", "größe", "注文", &long, "a.write-", "a.write-1b"]
        {
            assert_eq!(check_index_name(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn each_broken_rule_is_named() {
        for (name, rule) in [
            ("", "empty"),
            (".", "\".\""),
            ("..", "\"..\""),
            ("-a", "begin"),
            ("_a", "begin"),
            ("+a", "begin"),
            ("Orders", "lower-case"),
            ("Ärger", "lower-case"),
            ("a b", "' '"),
            ("a*", "'*'"),
            ("a,b", "','"),
            ("a/b", "'/'"),
            ("a\\b", "\\\\"),
            ("a?", "'?'"),
            ("a\"", "'\"'"),
            ("a<", "'<'"),
            ("a>", "'>'"),
            ("a|b", "'|'"),
            ("a#b", "'#'"),
            ("a:b", "':'"),
            ("a;b", "';'"),
            ("a\nb", "\\n"),
            ("pg_es_sync-lease", "itself"),
            ("a-3.write-1519231", "itself"),
        ] {
            let error = check_index_name(name).unwrap_err();
            assert!(error.contains(rule), "{name:?}: {error}");
        }
        assert!(check_index_name(&"x".repeat(201)).unwrap_err().contains("200 bytes"));
    }

    #[test]
    fn a_path_never_names_more_than_one_index() {
        for name in ["", "*", "_all", "a,b", "a*", "-a", "<x-{now/d}>", "a/_doc"] {
            assert_eq!(path_name(name).unwrap_err().kind, FailureKind::Config, "{name}");
        }
        assert_eq!(path_name("größe-1").unwrap(), "gr%C3%B6%C3%9Fe-1");
    }
}
