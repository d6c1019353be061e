//! The NDJSON of one bulk request, under construction.

use std::io::Write;

/// What an operation's first line and line ends take beside id and routing: action, 20 digits of version, punctuation.
const OVERHEAD: usize =
    r#"{"delete":{"_id":"","routing":"","version":-9223372036854775808,"version_type":"external"}}"#.len() + 2;

/// A bulk body. Every operation carries its version with `version_type=external`, so that a late or repeated
/// request never overwrites newer state. [`Body::clear`] keeps the buffer for the next batch.
#[derive(Debug, Default)]
pub struct Body {
    bytes: Vec<u8>,
    operations: usize,
    deletes: usize,
}

impl Body {
    pub fn new() -> Body {
        Body::default()
    }

    /// Adds "store this document". The engine takes a line end for the end of the document; in JSON it can only stand
    /// between tokens (a `json` column keeps what its author wrote), where a space says the same.
    pub fn index(&mut self, id: &str, routing: Option<&str>, version: i64, document: &[u8]) {
        self.action("index", id, routing, version);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(document);
        // Nearly no document has one, and looking is a memchr.
        if document.contains(&b'\n') {
            self.bytes[start..].iter_mut().filter(|byte| **byte == b'\n').for_each(|byte| *byte = b' ');
        }
        self.bytes.push(b'\n');
    }

    /// Adds "remove this document".
    pub fn delete(&mut self, id: &str, routing: Option<&str>, version: i64) {
        self.action("delete", id, routing, version);
        self.deletes += 1;
    }

    fn action(&mut self, action: &str, id: &str, routing: Option<&str>, version: i64) {
        self.bytes.extend_from_slice(b"{\"");
        self.bytes.extend_from_slice(action.as_bytes());
        self.bytes.extend_from_slice(b"\":{\"_id\":");
        push_json_string(&mut self.bytes, id);
        if let Some(routing) = routing {
            self.bytes.extend_from_slice(b",\"routing\":");
            push_json_string(&mut self.bytes, routing);
        }
        self.bytes.extend_from_slice(b",\"version\":");
        // Writing into a Vec does not fail.
        let _ = write!(self.bytes, "{version}");
        self.bytes.extend_from_slice(b",\"version_type\":\"external\"}}\n");
        self.operations += 1;
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.operations == 0
    }

    /// Bytes that the buffer keeps room for.
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    pub fn operations(&self) -> usize {
        self.operations
    }

    pub fn has_deletes(&self) -> bool {
        self.deletes > 0
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.operations = 0;
        self.deletes = 0;
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Bytes that one operation takes at most, to plan a body's size. `document_len` is 0 for a delete.
pub fn operation_len(id: &str, routing: Option<&str>, document_len: usize) -> usize {
    let length = |text: &str| text.len() + text.bytes().filter(|byte| needs_escape(*byte)).count() * "\\u0000".len();
    OVERHEAD + length(id) + routing.map_or(0, length) + document_len
}

fn needs_escape(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

fn push_json_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.push(b'"');
    if text.bytes().any(needs_escape) {
        for byte in text.bytes() {
            match byte {
                b'"' | b'\\' => bytes.extend_from_slice(&[b'\\', byte]),
                0..0x20 => {
                    // Writing into a Vec does not fail.
                    let _ = write!(bytes, "\\u{byte:04x}");
                }
                _ => bytes.push(byte),
            }
        }
    } else {
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_lines_with_external_versions() {
        let mut body = Body::new();
        body.index("1", None, 65536, br#"{"a":1}"#);
        assert!(!body.has_deletes());
        body.delete("ö", Some("a\"b"), 131072);
        assert_eq!(
            std::str::from_utf8(body.as_bytes()).unwrap(),
            "{\"index\":{\"_id\":\"1\",\"version\":65536,\"version_type\":\"external\"}}\n{\"a\":1}\n\
             {\"delete\":{\"_id\":\"ö\",\"routing\":\"a\\\"b\",\"version\":131072,\"version_type\":\"external\"}}\n"
        );
        assert!(body.has_deletes());
        assert_eq!((body.operations(), body.is_empty()), (2, false));
    }

    #[test]
    fn a_line_end_inside_a_document_becomes_a_space() {
        let mut body = Body::new();
        body.index("1", None, 1, b"{\n\"a\":\r\n\"\\n\"}\n");
        let lines: Vec<&str> = std::str::from_utf8(body.as_bytes()).unwrap().lines().collect();
        assert_eq!(lines[1..], ["{ \"a\":\r \"\\n\"} "]);
    }

    #[test]
    fn any_id_survives_the_json() {
        let id: String = (0..0x300).filter_map(char::from_u32).chain("😀\\\"".chars()).collect();
        let mut body = Body::new();
        body.delete(&id, None, 1);
        assert_eq!(body.as_bytes().iter().filter(|byte| **byte == b'\n').count(), 1);
        let line: serde_json::Value = serde_json::from_slice(body.as_bytes()).unwrap();
        assert_eq!(line["delete"]["_id"], serde_json::Value::from(id));
    }

    #[test]
    fn the_planned_length_is_never_too_short() {
        let words = ["", "1", "\"\\\n\u{1}", "größe"];
        for (id, routing) in words.iter().flat_map(|id| words.map(|routing| (*id, Some(routing)))) {
            for version in [0, i64::MAX, i64::MIN] {
                let mut body = Body::new();
                body.index(id, routing, version, b"{}");
                assert!(body.len() <= operation_len(id, routing, 2));
                body.clear();
                body.delete(id, routing, version);
                assert!(body.len() <= operation_len(id, routing, 0));
            }
        }
    }

    #[test]
    fn a_cleared_body_keeps_its_buffer() {
        let mut body = Body::new();
        body.delete("1", None, 1);
        let capacity = body.capacity();
        body.clear();
        assert!(body.is_empty() && body.as_bytes().is_empty() && !body.has_deletes());
        assert_eq!(body.capacity(), capacity);
    }
}
