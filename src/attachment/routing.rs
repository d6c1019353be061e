//! Routing: a column of the table decides on which shard a row's document lies.
//!
//! The engine finds a document by its id and routing. Whoever deletes one, or lets its routing change, must know the
//! former routing, and the row does not have it any more. So capture notes it: under a source of its own, a number as
//! links have, the queue holds keys, each with a routing under which its document may lie. Such a pair is only ever read
//! as "look at this key, and let nothing stay there if the row is not there": too many of them do no harm.

use std::rc::Rc;

use super::link;

/// Under which routing a document lies; None where its id decides. An empty text is none to the engine.
pub type Routing = Option<Rc<str>>;

/// The routing that a column's text makes.
pub fn of_text(text: &str) -> Routing {
    (!text.is_empty()).then(|| Rc::from(text))
}

/// Appends a key and a former routing, as the queue holds them.
pub fn push(noted: &mut String, key: &str, routing: Option<&str>) {
    link::push_value(noted, true, Some(key));
    link::push_value(noted, false, routing);
}

/// Takes apart what `push` made; None for anything else.
pub fn pair(noted: &str) -> Option<(String, Routing)> {
    let [key, routing]: [Option<String>; 2] = link::values(noted, 2)?.try_into().ok()?;
    Some((key?, routing.as_deref().and_then(of_text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_and_routing_come_apart_as_they_were_put_together() {
        for key in ["", "7", "a|b", "a\\|b|c", "\\"] {
            for routing in [None, Some("x"), Some("|"), Some("\\N")] {
                let mut noted = String::new();
                push(&mut noted, key, routing);
                assert_eq!(pair(&noted), Some((key.to_owned(), routing.map(Rc::from))));
            }
        }
        assert_eq!(pair("7|"), Some(("7".to_owned(), None)), "an empty routing is none");
        assert_eq!(pair("7"), None);
    }
}
