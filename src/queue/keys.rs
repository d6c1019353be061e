//! The keys of a queue row as bytes. Plain data, no Postgres.
//!
//! Integers are written in ascending order as the difference to the one before, one to ten bytes each: neighbours, as
//! bulk statements change them, take one. An array of texts took twelve, and the writer's time with them. Texts are
//! written as their length and their bytes.

use std::rc::Rc;

use smallvec::SmallVec;

/// A key as text: integers as their decimal digits.
pub type Key = Rc<str>;

/// Keys of a row on their way into the queue: integers, or texts.
#[derive(Default)]
pub struct Keys {
    bytes: Vec<u8>,
    count: usize,
    last: i64,
}

/// The first byte: what follows.
const INTEGERS: u8 = 1;
const TEXTS: u8 = 2;

/// Most bytes of a row: with its header it still fits a page, so nothing is stored out of line.
const MAX_BYTES: usize = 7_900;
/// Most keys of a row, which is claimed and acknowledged as a whole.
const MAX_KEYS: usize = 1_000;
/// Most bytes of a number.
const MAX_NUMBER: usize = 10;

impl Keys {
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.count = 0;
        self.last = 0;
    }

    /// True if a text of this length does not fit any more.
    pub fn is_full_for(&self, length: usize) -> bool {
        self.count == MAX_KEYS || (self.count > 0 && self.bytes.len() + MAX_NUMBER + length > MAX_BYTES)
    }

    /// Appends an integer that is not below the last one; never among texts.
    pub fn push_integer(&mut self, key: i64) {
        if self.count == 0 {
            self.bytes.push(INTEGERS);
            // Small numbers of either sign are short: 0, -1, 1, -2, ...
            self.push_number((key << 1 ^ key >> 63) as u64);
        } else {
            self.push_number(key.wrapping_sub(self.last) as u64);
        }
        self.last = key;
        self.count += 1;
    }

    /// Appends a text; never among integers.
    pub fn push_text(&mut self, key: &str) {
        if self.count == 0 {
            self.bytes.push(TEXTS);
        }
        self.push_number(key.len() as u64);
        self.bytes.extend_from_slice(key.as_bytes());
        self.count += 1;
    }

    /// Seven bits a byte, the lowest first; the eighth says that there are more.
    fn push_number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.bytes.push(number as u8);
    }
}

/// The keys of a row; None if these bytes are no keys. A small transaction's row has one.
pub fn decode(bytes: &[u8]) -> Option<SmallVec<[Key; 1]>> {
    let (kind, mut rest) = bytes.split_first()?;
    let mut keys = SmallVec::new();
    match *kind {
        INTEGERS => {
            let mut digits = itoa::Buffer::new();
            let first = number(&mut rest)?;
            let mut last = (first >> 1) as i64 ^ -((first & 1) as i64);
            keys.push(Rc::from(digits.format(last)));
            while !rest.is_empty() {
                last = last.wrapping_add(number(&mut rest)? as i64);
                keys.push(Rc::from(digits.format(last)));
            }
        }
        TEXTS => {
            while !rest.is_empty() {
                let length = number(&mut rest)?;
                let (text, others) = rest.split_at_checked(usize::try_from(length).ok()?)?;
                keys.push(Rc::from(std::str::from_utf8(text).ok()?));
                rest = others;
            }
        }
        _ => return None,
    }
    Some(keys)
}

fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for place in 0..MAX_NUMBER {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bytes: &[u8]) -> Option<Vec<String>> {
        decode(bytes).map(|keys| keys.iter().map(|key| key.to_string()).collect())
    }

    fn integers(keys: &[i64]) -> Keys {
        let mut written = Keys::default();
        keys.iter().for_each(|key| written.push_integer(*key));
        written
    }

    #[test]
    fn integers_come_back_as_they_were() {
        for keys in [
            &[0][..],
            &[-1],
            &[1, 2, 3],
            &[i64::MIN, -5, 0, 5, i64::MAX],
            &[i64::MIN, i64::MAX],
            &[7, 7],
            &[127, 128, 255, 16_383, 16_384, 1 << 40],
        ] {
            let expected: Vec<String> = keys.iter().map(i64::to_string).collect();
            assert_eq!(decoded(integers(keys).bytes()), Some(expected));
        }
    }

    #[test]
    fn neighbours_take_a_byte_each() {
        let keys: Vec<i64> = (1_000_000..1_000_500).collect();
        assert!(integers(&keys).bytes().len() < 510);
    }

    #[test]
    fn texts_come_back_as_they_were() {
        let mut keys = Keys::default();
        let long = "x".repeat(300);
        let texts = ["", "a", "|", "\\N", "größer", &long];
        texts.iter().for_each(|text| keys.push_text(text));
        assert_eq!(decoded(keys.bytes()), Some(texts.map(str::to_owned).to_vec()));
        assert_eq!(keys.count(), texts.len());
        keys.clear();
        keys.push_integer(3);
        assert_eq!(decoded(keys.bytes()), Some(vec!["3".to_owned()]), "used again");
    }

    #[test]
    fn a_row_fits_a_page_unless_it_is_a_single_text() {
        let mut keys = Keys::default();
        while !keys.is_full_for(100) {
            keys.push_text(&"x".repeat(100));
        }
        assert!(keys.bytes().len() <= MAX_BYTES && keys.count() > 70);
        let mut keys = Keys::default();
        assert!(!keys.is_full_for(10_000));
        keys.push_text(&"x".repeat(10_000));
        assert!(keys.is_full_for(0));
        let many: Vec<i64> = (0..MAX_KEYS as i64).map(|key| key << 50).collect();
        let keys = integers(&many);
        assert!(keys.is_full_for(0) && keys.bytes().len() <= MAX_NUMBER * MAX_KEYS + 1);
    }

    #[test]
    fn bytes_that_are_no_keys_are_told_from_keys() {
        for bytes in [
            &[][..],
            &[INTEGERS],
            &[9, 1],
            &[INTEGERS, 0x80],
            &[TEXTS, 5, b'a'],
            &[TEXTS, 1, 0xff],
            &[INTEGERS, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert_eq!(decoded(bytes), None, "{bytes:?}");
        }
    }
}
