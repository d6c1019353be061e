//! Which of a batch's integer keys are read as a range of the key's index, and which one by one.
//!
//! One by one, each is looked for from the index's root; a row of a range costs a sixth of that (1.7 and 0.3 us,
//! PostgreSQL 15, rows of 300 bytes in memory). A large statement changes neighbours.

/// So many keys are looked at together; a statement for fewer would cost more than it saves.
const BLOCK: usize = 64;
/// In a range, for each key that is wanted, so many may lie that are not.
const OTHERS: i64 = 1;

/// Keys that one statement reads: neighbours of each other, in ascending order.
#[derive(Debug, PartialEq)]
pub struct Piece<'a> {
    pub keys: &'a [i64],
    pub is_range: bool,
}

impl Piece<'_> {
    /// The first key and the last.
    pub fn ends(&self) -> [i64; 2] {
        [self.keys[0], self.keys[self.keys.len() - 1]]
    }

    /// Whether the row with this key, which lies in the range, was asked for.
    pub fn contains(&self, key: i64) -> bool {
        self.keys.binary_search(&key).is_ok()
    }
}

/// Cuts keys, ascending and without duplicates, into pieces. `exact`: no row may be read that is not asked for.
pub fn cut(keys: &[i64], exact: bool) -> Vec<Piece<'_>> {
    let others = if exact { 0 } else { OTHERS };
    let is_dense = |keys: &[i64]| {
        let wanted = keys.len() as i64;
        keys[keys.len() - 1].checked_sub(keys[0]).is_some_and(|distance| distance < wanted + wanted * others)
    };
    let mut pieces: Vec<Piece> = Vec::new();
    let mut begin = 0;
    for block in keys.chunks(BLOCK) {
        let end = begin + block.len();
        let goes_on = pieces.last().is_some_and(|last| last.is_range) && is_dense(&keys[begin - 1..end]);
        let is_range = goes_on || block.len() == BLOCK && is_dense(block);
        match pieces.last_mut() {
            Some(last) if goes_on || !last.is_range && !is_range => last.keys = &keys[begin - last.keys.len()..end],
            _ => pieces.push(Piece { keys: block, is_range }),
        }
        begin = end;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(keys: &[i64], exact: bool) -> Vec<(usize, bool)> {
        let pieces = cut(keys, exact);
        let all: Vec<i64> = pieces.iter().flat_map(|piece| piece.keys).copied().collect();
        assert_eq!(all, keys, "each key is in one piece, in order");
        pieces.iter().map(|piece| (piece.keys.len(), piece.is_range)).collect()
    }

    #[test]
    fn neighbours_are_a_range_unless_they_are_few() {
        let keys: Vec<i64> = (1..=1000).collect();
        assert_eq!(pieces(&keys, true), [(1000, true)]);
        assert_eq!(pieces(&keys[..63], true), [(63, false)]);
    }

    #[test]
    fn a_range_may_hold_as_many_others_as_wanted_unless_it_is_to_be_exact() {
        let even: Vec<i64> = (1..=128).map(|key| key * 2).collect();
        assert_eq!(pieces(&even, false), [(128, true)]);
        assert_eq!(pieces(&even, true), [(128, false)]);
        let third: Vec<i64> = (1..=128).map(|key| key * 3).collect();
        assert_eq!(pieces(&third, false), [(128, false)]);
    }

    #[test]
    fn ranges_that_lie_apart_are_pieces_of_their_own() {
        let keys: Vec<i64> = (0..64).chain(10_000..10_064).chain((20_000..).step_by(1000).take(70)).collect();
        assert_eq!(pieces(&keys, false), [(64, true), (64, true), (70, false)]);
    }

    #[test]
    fn the_whole_width_of_an_integer_is_no_range() {
        let keys: Vec<i64> = [i64::MIN].into_iter().chain(1..63).chain([i64::MAX]).collect();
        assert_eq!(pieces(&keys, false), [(64, false)]);
        assert_eq!(pieces(&[], false), []);
    }
}
