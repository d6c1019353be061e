//! Which columns of a view are equal, and the way from a row of one of its tables to the view's keys. Plain data, no
//! Postgres.
//!
//! An edge leads from a column to one that equals it *wherever the first one's row has a part in a row of the view*. So
//! it has a direction: a condition of `a left join b` binds b, not a. Following edges finds every row of the view in
//! which a table's row has a part, and maybe some more, which costs a needless refresh and nothing else.

use std::collections::{BTreeSet, VecDeque};

/// A table at one place in the view.
#[derive(Debug, Clone)]
pub struct Table {
    pub oid: u32,
    /// False where changes fire no triggers: it may lie on a way, but cannot be the beginning of one.
    pub fires: bool,
    /// Columns of its indexes, and whether each is unique.
    pub indexes: Vec<(bool, Vec<i16>)>,
    /// What stands in the way of following it, as far as the view shows.
    pub obstacle: Option<String>,
    /// The queries around it whose rows decide about each other: its row does, and another's may be shown.
    pub deciding: Vec<usize>,
}

/// Something that has a value in each row: a table's column, or a column that a query returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Node {
    Column { table: usize, number: i16 },
    Output { query: usize, column: usize },
}

/// How two columns compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// The same value.
    Same,
    /// Equal by an operator, which belongs to a family: equality within a family and a collation is transitive.
    Equal { operator: u32, family: u32, collation: u32 },
    /// The first is an element of the second.
    Element { operator: u32 },
    /// The second is an element of the first.
    Contains { operator: u32 },
}

impl Comparison {
    /// What follows from `a self b` and `b next c` for a and c.
    pub fn then(self, next: Self) -> Option<Self> {
        match (self, next) {
            (Comparison::Same, next) => Some(next),
            (first, Comparison::Same) => Some(first),
            (
                Comparison::Equal { family, collation, .. },
                Comparison::Equal { family: other, collation: its, operator },
            ) if family == other && collation == its => Some(Comparison::Equal { operator, family, collation }),
            _ => None,
        }
    }

    fn is_equality(self) -> bool {
        matches!(self, Comparison::Same | Comparison::Equal { .. })
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Edge {
    pub from: Node,
    pub to: Node,
    pub how: Comparison,
    /// It leads down, from what a query returns to the row that it has picked: of another one it may be false.
    pub picked: bool,
}

/// A view as tables and edges.
#[derive(Debug, Default)]
pub struct Graph {
    pub tables: Vec<Table>,
    pub edges: Vec<Edge>,
}

/// A condition between columns of two tables on a way; tables count along the way, from 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Condition {
    pub left: (usize, i16),
    pub how: Comparison,
    pub right: (usize, i16),
}

/// A way from one table's row to the view's keys.
#[derive(Debug, PartialEq)]
pub struct Way {
    /// The tables along it; the first is where it begins.
    pub tables: Vec<usize>,
    pub conditions: Vec<Condition>,
    /// For each key column the column that equals it, and how.
    pub keys: Vec<((usize, i16), Comparison)>,
}

impl Way {
    /// The columns of the first table that the way begins with, in order.
    pub fn columns(&self) -> Vec<i16> {
        let ends = self.conditions.iter().flat_map(|condition| [condition.left, condition.right]);
        let keys = self.keys.iter().map(|(column, _)| *column);
        let columns: BTreeSet<i16> =
            ends.chain(keys).filter(|(table, _)| *table == 0).map(|(_, number)| number).collect();
        columns.into_iter().collect()
    }
}

/// What a step into a table costs, so that the way is chosen that reads least.
const ONE_ROW: u32 = 1;
const SOME_ROWS: u32 = 5;
const ALL_ROWS: u32 = 100;

impl Graph {
    /// For each table the way from its rows to the keys; None if the view does not determine one.
    ///
    /// A way is gone over when the rows along it are as they are by then. Where one of those has changed, too, its own way
    /// is counted on; so no way leads over a table whose own way leads back over this one.
    pub fn ways(&self, keys: &[Node]) -> Vec<Option<Way>> {
        let mut ways: Vec<Option<Way>> = Vec::new();
        for from in 0..self.tables.len() {
            let avoided: Vec<bool> = (0..from).map(|table| leads_over(&ways, table, from)).collect();
            ways.push(self.way(from, keys, &avoided));
        }
        ways
    }

    /// The cheapest way from a row of `from` to the keys that leads over none of the `avoided` tables.
    fn way(&self, from: usize, keys: &[Node], avoided: &[bool]) -> Option<Way> {
        let mut costs = vec![u32::MAX; self.tables.len()];
        let mut before: Vec<Option<usize>> = vec![None; self.tables.len()];
        let mut open = vec![from];
        costs[from] = 0;
        while let Some(place) = (0..open.len()).min_by_key(|place| (costs[open[*place]], *place)) {
            let table = open.swap_remove(place);
            let mut path = vec![table];
            while let Some(previous) = before[path[path.len() - 1]] {
                path.push(previous);
            }
            path.reverse();
            if let Some(way) = self.complete(path, keys) {
                return Some(way);
            }
            let neighbours = self.neighbours(table, from).into_iter();
            for (next, columns) in neighbours.filter(|(next, _)| avoided.get(*next) != Some(&true)) {
                let cost = costs[table] + self.cost(next, &columns);
                if cost < costs[next] {
                    costs[next] = cost;
                    before[next] = Some(table);
                    if !open.contains(&next) {
                        open.push(next);
                    }
                }
            }
        }
        None
    }

    /// All nodes that a table's columns lead to, on a way that begins at `from`. Where a query around `from` picks rows,
    /// its row may be passed over, and has a part in a document nevertheless: what the picked one equals says nothing
    /// of it.
    fn reach(&self, table: usize, from: usize) -> Vec<(i16, Comparison, Node)> {
        let deciding = &self.tables[from].deciding;
        let is_of_another =
            |edge: &Edge| edge.picked && matches!(edge.from, Node::Output { query, .. } if deciding.contains(&query));
        let numbers: BTreeSet<i16> = self
            .edges
            .iter()
            .filter_map(|edge| match edge.from {
                Node::Column { table: its, number } if its == table => Some(number),
                _ => None,
            })
            .collect();
        let mut found: Vec<(i16, Comparison, Node)> = Vec::new();
        for number in numbers {
            let mut queue = VecDeque::from([(Node::Column { table, number }, Comparison::Same)]);
            while let Some((node, how)) = queue.pop_front() {
                for edge in self.edges.iter().filter(|edge| edge.from == node && !is_of_another(edge)) {
                    let Some(how) = how.then(edge.how) else { continue };
                    if edge.to != (Node::Column { table, number })
                        && !found.iter().any(|known| (known.0, known.1, known.2) == (number, how, edge.to))
                    {
                        found.push((number, how, edge.to));
                        queue.push_back((edge.to, how));
                    }
                }
            }
        }
        found
    }

    fn neighbours(&self, table: usize, from: usize) -> Vec<(usize, Vec<i16>)> {
        let mut found: Vec<(usize, Vec<i16>)> = Vec::new();
        for (_, how, node) in self.reach(table, from) {
            let Node::Column { table: next, number } = node else { continue };
            if next == table {
                continue;
            }
            // An index on an array is not one on its elements.
            let columns = if matches!(how, Comparison::Element { .. }) { Vec::new() } else { vec![number] };
            match found.iter_mut().find(|(known, _)| *known == next) {
                Some((_, known)) => known.extend(columns),
                None => found.push((next, columns)),
            }
        }
        found
    }

    fn cost(&self, table: usize, columns: &[i16]) -> u32 {
        let indexes = &self.tables[table].indexes;
        if indexes.iter().any(|(unique, index)| *unique && index.iter().all(|column| columns.contains(column))) {
            ONE_ROW
        } else if indexes.iter().any(|(_, index)| index.first().is_some_and(|column| columns.contains(column))) {
            SOME_ROWS
        } else {
            ALL_ROWS
        }
    }

    /// The way along these tables, if their columns make up all keys.
    fn complete(&self, path: Vec<usize>, keys: &[Node]) -> Option<Way> {
        let reached: Vec<_> = path.iter().map(|table| self.reach(*table, path[0])).collect();
        // The later table first: it is nearer to the keys.
        let key = |key: &Node| {
            reached.iter().enumerate().rev().find_map(|(place, reached)| {
                let (number, how, _) = reached.iter().find(|(_, how, node)| node == key && how.is_equality())?;
                Some(((place, *number), *how))
            })
        };
        let keys: Vec<_> = keys.iter().map(key).collect::<Option<_>>()?;
        let mut conditions: Vec<Condition> = Vec::new();
        for (place, reached) in reached.iter().enumerate() {
            for (number, how, node) in reached {
                let Node::Column { table, number: its } = node else { continue };
                let Some(other) = path.iter().position(|on_path| on_path == table) else { continue };
                let (left, right) = ((place, *number), (other, *its));
                // Only onwards: what a later table's row equals is one row of the earlier table, the first of a group for
                // instance, and the way may come from another row.
                if place < other && !conditions.iter().any(|known| (known.left, known.right) == (left, right)) {
                    conditions.push(Condition { left, how: *how, right });
                }
            }
        }
        Some(Way { tables: path, conditions, keys })
    }
}

/// True if the way of `table` leads over `other`, or over a table whose way does.
fn leads_over(ways: &[Option<Way>], table: usize, other: usize) -> bool {
    let way = ways.get(table).and_then(Option::as_ref);
    way.is_some_and(|way| way.tables[1..].iter().any(|next| *next == other || leads_over(ways, *next, other)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EQUAL: Comparison = Comparison::Equal { operator: 96, family: 1976, collation: 0 };

    fn column(table: usize, number: i16) -> Node {
        Node::Column { table, number }
    }

    const KEY: Node = Node::Output { query: 0, column: 0 };

    fn graph(tables: usize, edges: &[(Node, Node)]) -> Graph {
        let table =
            |_| Table { oid: 1, fires: true, indexes: vec![(true, vec![1])], obstacle: None, deciding: Vec::new() };
        let edges = edges.iter().map(|(from, to)| Edge {
            from: *from,
            to: *to,
            how: if matches!((from, to), (Node::Column { .. }, Node::Column { .. })) {
                EQUAL
            } else {
                Comparison::Same
            },
            picked: false,
        });
        Graph { tables: (0..tables).map(table).collect(), edges: edges.collect() }
    }

    #[test]
    fn a_column_that_equals_the_key_needs_no_other_table() {
        // select r.id from r join i on i.r_id = r.id
        let graph = graph(
            2,
            &[(column(0, 1), KEY), (KEY, column(0, 1)), (column(1, 2), column(0, 1)), (column(0, 1), column(1, 2))],
        );
        let way = graph.way(1, &[KEY], &[]).unwrap();
        assert_eq!((way.tables.clone(), way.columns()), (vec![1], vec![2]));
        assert_eq!(way.keys, [((0, 2), EQUAL)]);
    }

    #[test]
    fn the_way_leads_over_other_tables() {
        // select r.id from r left join h on h.id = r.h_id
        let graph = graph(2, &[(column(0, 1), KEY), (column(1, 1), column(0, 2))]);
        let way = graph.way(1, &[KEY], &[]).unwrap();
        assert_eq!((way.tables.clone(), way.columns()), (vec![1, 0], vec![1]));
        assert_eq!(way.conditions, [Condition { left: (0, 1), how: EQUAL, right: (1, 2) }]);
        assert_eq!(way.keys, [((1, 1), Comparison::Same)]);
    }

    #[test]
    fn an_edge_is_not_followed_backwards() {
        let graph = graph(2, &[(column(0, 1), KEY), (column(0, 2), column(1, 1))]);
        assert_eq!(graph.way(1, &[KEY], &[]), None);
    }

    #[test]
    fn a_unique_step_is_preferred_to_one_that_reads_many_rows() {
        // i.tenant = r.tenant and i.x_id = x.id and x.r_id = r.id
        let graph = graph(
            3,
            &[
                (column(0, 1), KEY),
                (column(1, 5), column(0, 5)),
                (column(1, 2), column(2, 1)),
                (column(2, 2), column(0, 1)),
            ],
        );
        let way = graph.way(1, &[KEY], &[]).unwrap();
        assert_eq!(way.tables, [1, 2]);
    }

    /// select r.id from r, lateral (select s.x from o join s on s.id = o.s_id where s.r_id = r.id and o.x = r.x limit 1) q
    /// where q.x = r.x; then as if `o` stood outside of the LIMIT.
    #[test]
    fn what_a_query_picks_tells_nothing_of_the_rows_that_it_passes_over() {
        let picked = Node::Output { query: 1, column: 0 };
        let mut graph = graph(
            3,
            &[
                (column(0, 1), KEY),
                (column(1, 2), column(2, 1)),
                (column(2, 2), column(0, 1)),
                (column(1, 3), column(0, 3)),
                (column(0, 3), picked),
                (picked, column(2, 3)),
            ],
        );
        graph.edges[5].picked = true;
        graph.tables[1].deciding = vec![1];
        let onwards = Condition { left: (0, 2), how: EQUAL, right: (1, 1) };
        assert_eq!(graph.way(1, &[KEY], &[]).unwrap().conditions, [onwards]);
        graph.tables[1].deciding.clear();
        assert_eq!(graph.way(1, &[KEY], &[]).unwrap().conditions.len(), 2);
    }

    #[test]
    fn equalities_of_different_families_do_not_add_up() {
        let mut graph = graph(3, &[(column(0, 1), KEY), (column(1, 2), column(2, 1)), (column(2, 1), column(0, 1))]);
        graph.edges[1].how = Comparison::Equal { operator: 98, family: 1994, collation: 100 };
        let way = graph.way(1, &[KEY], &[]).unwrap();
        assert_eq!(way.tables, [1, 2], "over the table in between, row by row");
    }
}
