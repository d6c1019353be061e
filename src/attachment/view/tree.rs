//! Reads a view's stored query: its tables, which columns are used, and which are equal where.
//!
//! The query tree is the one that Postgres keeps for the view; nothing is parsed here. What is not understood makes no
//! edge: then a way is missing and is asked for, instead of guessed.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::ffi::{CStr, CString, c_void};
use std::rc::Rc;

use pgrx::{FromDatum, PgList, PgRelation, PgSqlErrorCode, is_a, pg_sys};

use super::graph::{Comparison, Edge, Graph, Node, Table};
use crate::attachment::operator::{equality, gathering};
use crate::postgres::error::Report;
use crate::postgres::relation;
use crate::postgres::rights;
use crate::postgres::spi;

/// What a view reads, and how.
pub struct Tree {
    pub graph: Graph,
    /// Names and types of the view's columns.
    pub columns: Vec<(String, pg_sys::Oid)>,
    /// What changes without a trigger firing: its name, and why.
    pub unfollowed: Vec<(String, String)>,
    /// Functions that are not Postgres' own, those of operators and aggregates included.
    pub functions: Vec<pg_sys::Oid>,
    /// Views within it.
    pub views: Vec<pg_sys::Oid>,
    queries: Vec<Built>,
    top: usize,
    _relations: Vec<PgRelation>,
}

/// Columns of a table that a view uses.
#[derive(Debug, Clone, PartialEq)]
pub enum Used {
    /// The row as a whole, or what only the system knows of it.
    Everything,
    Columns(BTreeSet<i16>),
}

/// A query, as far as it was read.
#[derive(Default)]
struct Built {
    /// Used whatever is taken of the result.
    always: Vec<Node>,
    /// Used for each of its columns.
    outputs: Vec<Vec<Node>>,
}

/// What an entry of a range table stands for.
#[derive(Clone)]
enum Source {
    Table(usize),
    Query(usize),
    Join(*mut pg_sys::RangeTblEntry),
    /// No table, or none that is understood: what it is, for a message.
    Other(&'static str),
}

type Scope = Rc<RefCell<Vec<Source>>>;

/// A query's surroundings: range tables from the outermost to its own, and the queries that they belong to.
#[derive(Clone, Default)]
struct Levels {
    scopes: Vec<Scope>,
    queries: Vec<*mut pg_sys::Query>,
}

/// Number of a whole row, and what stands for columns that only the system has.
const WHOLE_ROW: i16 = 0;

/// OIDs below are Postgres' own.
const FIRST_NORMAL_OID: u32 = 16_384;

/// Why a foreign table is not followed, nor a partition that is one.
const FOREIGN: &str = "it is a foreign table, whose changes elsewhere fire no triggers here";

/// Why a result is not followed that is another one later.
pub const WITH_TIME: &str = "its result changes with time";

/// Why a result is not followed that is another one to another user, or in another session.
pub const WITH_SESSION: &str = "its result changes with the session";

struct Reader {
    /// The statement that is read; None for a view's stored query.
    text: Option<CString>,
    graph: Graph,
    queries: Vec<Built>,
    unfollowed: Vec<(String, String)>,
    functions: Vec<pg_sys::Oid>,
    views: Vec<pg_sys::Oid>,
    relations: Vec<PgRelation>,
    /// What the expression that is being read uses.
    found: Vec<Node>,
    depth: usize,
}

impl Tree {
    /// Reads the stored query of a view. SPI must be connected.
    pub fn of_view(view: pg_sys::Oid) -> Self {
        // SAFETY: opened with a lock that lasts as long as the reference, which the tree keeps.
        let relation = unsafe { PgRelation::with_lock(view, pg_sys::AccessShareLock as i32) };
        // SAFETY: it is a view, so it has one rule, whose query lives as long as the relation is open.
        let query = unsafe { pg_sys::get_view_query(relation.as_ptr()) };
        let columns = relation.tuple_desc().iter().map(|column| (column.name().to_owned(), column.atttypid)).collect();
        // SAFETY: as above.
        unsafe { Self::of_query(query, columns, relation) }
    }

    /// # Safety
    /// `query` is an analysed query that lives as long as `relation` is open.
    unsafe fn of_query(query: *mut pg_sys::Query, columns: Vec<(String, pg_sys::Oid)>, relation: PgRelation) -> Self {
        let mut reader = Reader::new();
        reader.relations.push(relation);
        // SAFETY: the caller's.
        let top = unsafe { reader.query(query, &Levels::default()) };
        reader.into_tree(top, columns)
    }

    /// Reads a statement as it is. It is analysed with the search path of the moment, and as `owner`: analysing calls
    /// the input functions of the types of its literals, among them the checks of domains, which are anybody's code.
    pub fn of_statement(owner: pg_sys::Oid, sql: &str) -> Self {
        let text = CString::new(sql).unwrap_or_default();
        let mut reader = Reader { text: Some(text.clone()), ..Reader::new() };
        // SAFETY: a live transaction; the trees are palloc'd and outlive their use here. What is wrong with the
        // statement is raised.
        let top = unsafe {
            let raw = PgList::<pg_sys::RawStmt>::from_pg(pg_sys::pg_parse_query(text.as_ptr()));
            let statement = raw.get_ptr(0).unwrap_or(std::ptr::null_mut());
            let query = rights::as_owner(owner, || {
                pg_sys::parse_analyze_fixedparams(statement, text.as_ptr(), std::ptr::null(), 0, std::ptr::null_mut())
            });
            reader.query(query, &Levels::default())
        };
        reader.into_tree(top, Vec::new())
    }

    /// Reads a condition on the rows of a relation, as the owner of the table that it filters.
    pub fn of_filter(owner: pg_sys::Oid, relation: pg_sys::Oid, filter: &str) -> Self {
        Self::of_statement(owner, &format!("select from {} where (\n{filter}\n)", spi::qualified(relation)))
    }

    /// The keys' places in the view's result.
    pub fn output(&self, column: usize) -> Node {
        Node::Output { query: self.top, column }
    }

    /// True if it calls functions that may read tables, of which nobody knows.
    pub fn calls_readers(&self) -> bool {
        // SAFETY: syscache lookups in a live transaction.
        self.functions
            .iter()
            .any(|function| unsafe { pg_sys::func_volatile(*function) } as u8 != pg_sys::PROVOLATILE_IMMUTABLE)
    }

    /// How many columns it returns.
    pub fn width(&self) -> usize {
        self.queries[self.top].outputs.len()
    }

    /// For each table, what of it is used where the given columns of the view are.
    pub fn used(&self, outputs: impl Iterator<Item = usize>) -> Vec<Used> {
        let mut open: Vec<Node> = outputs.map(|column| self.output(column)).collect();
        open.extend(self.queries[self.top].always.iter().copied());
        let mut seen: HashSet<Node> = HashSet::new();
        let mut used = vec![Used::Columns(BTreeSet::new()); self.graph.tables.len()];
        while let Some(node) = open.pop() {
            if !seen.insert(node) {
                continue;
            }
            match node {
                Node::Column { table, number } if number <= WHOLE_ROW => used[table] = Used::Everything,
                Node::Column { table, number } => {
                    if let Used::Columns(columns) = &mut used[table] {
                        columns.insert(number);
                    }
                }
                Node::Output { query, column } => {
                    open.extend(self.queries[query].outputs.get(column).into_iter().flatten().copied());
                }
            }
        }
        used
    }
}

impl Reader {
    fn new() -> Self {
        Self {
            text: None,
            graph: Graph::default(),
            queries: Vec::new(),
            unfollowed: Vec::new(),
            functions: Vec::new(),
            views: Vec::new(),
            relations: Vec::new(),
            found: Vec::new(),
            depth: 0,
        }
    }

    fn into_tree(self, top: usize, columns: Vec<(String, pg_sys::Oid)>) -> Tree {
        let Self { graph, queries, mut unfollowed, functions, views, relations, .. } = self;
        unfollowed.sort();
        unfollowed.dedup();
        Tree { graph, columns, unfollowed, functions, views, queries, top, _relations: relations }
    }

    /// Reads a query within its surroundings; its number.
    ///
    /// # Safety
    /// `query` is an analysed query, and `levels` are the queries around it.
    unsafe fn query(&mut self, query: *mut pg_sys::Query, levels: &Levels) -> usize {
        self.depth += 1;
        if self.depth > 100 {
            Report::new(
                PgSqlErrorCode::ERRCODE_STATEMENT_TOO_COMPLEX,
                "cannot follow a view that is nested too deeply",
            )
            .detail("Its queries lie more than 100 levels within each other.")
            .raise();
        }
        let number = self.queries.len();
        self.queries.push(Built::default());
        let first_table = self.graph.tables.len();
        let scope: Scope = Rc::default();
        let mut levels = levels.clone();
        levels.scopes.push(scope.clone());
        levels.queries.push(query);
        let outside = std::mem::take(&mut self.found);
        // SAFETY: a valid query's parts are valid, and have the types that they are read as.
        unsafe {
            let query = &*query;
            let mut members = HashSet::new();
            in_from(query.jointree.cast(), &mut members);
            in_from(query.setOperations, &mut members);
            let entries = PgList::<pg_sys::RangeTblEntry>::from_pg(query.rtable);
            for (place, entry) in entries.iter_ptr().enumerate() {
                // A view's rule also lists the view itself, as OLD and NEW.
                let source = if members.contains(&(place as i32 + 1)) || (*entry).rtekind == pg_sys::RTEKind::RTE_JOIN {
                    self.source(entry, &levels)
                } else {
                    Source::Other("nothing")
                };
                scope.borrow_mut().push(source);
            }
            self.join(query.jointree.cast(), &levels);
            self.expression(query.havingQual, &levels);
            self.expression(query.limitCount, &levels);
            self.expression(query.limitOffset, &levels);
            for window in PgList::<pg_sys::WindowClause>::from_pg(query.windowClause).iter_ptr() {
                self.expression((*window).startOffset, &levels);
                self.expression((*window).endOffset, &levels);
            }
            let always = std::mem::take(&mut self.found);
            self.queries[number].always.extend(always);
            self.outputs(query, number, &levels);
            if !leads_out(query) {
                for table in &mut self.graph.tables[first_table..] {
                    table.deciding.push(number);
                    table.obstacle.get_or_insert_with(|| {
                        "it is read below a LIMIT, DISTINCT ON, window function or grouping sets".to_owned()
                    });
                }
            }
        }
        self.found = outside;
        self.depth -= 1;
        number
    }

    /// # Safety
    /// As `query`.
    unsafe fn outputs(&mut self, query: &pg_sys::Query, number: usize, levels: &Levels) {
        // SAFETY: the caller's.
        unsafe {
            let branches = if query.setOperations.is_null() { Vec::new() } else { leaves(query.setOperations) };
            for target in PgList::<pg_sys::TargetEntry>::from_pg(query.targetList).iter_ptr() {
                let target = &*target;
                self.expression(target.expr.cast(), levels);
                let mut uses = std::mem::take(&mut self.found);
                let column = target.resno as usize - 1;
                if !branches.is_empty() {
                    // Each row is one of a branch's; from outside, nobody knows of which.
                    uses.clear();
                    for branch in &branches {
                        if let Some(Source::Query(branch)) = levels.source(0, *branch) {
                            let from = Node::Output { query: branch, column };
                            uses.push(from);
                            if query.limitCount.is_null()
                                && query.limitOffset.is_null()
                                && let Some(how) = combined(query.setOperations, column)
                            {
                                let to = Node::Output { query: number, column };
                                self.edge(from, to, how);
                            }
                        }
                    }
                    // Whether two rows are the same depends on all their columns.
                    self.queries[number].always.extend(uses.iter().copied());
                } else if let Some((node, level, _)) = self.column_of(target.expr.cast(), levels)
                    && let Some(how) = gathered(query, target)
                    && !target.resjunk
                {
                    let output = Node::Output { query: number, column };
                    let holds_for_all = leads_out(query) || is_fixed(query, target.ressortgroupref);
                    let picked = level == 0 && !holds_for_all;
                    self.graph.edges.push(Edge { from: output, to: node, how, picked });
                    // A row from around the query may have a part in a document without a row of the query's.
                    if level == 0 && holds_for_all {
                        self.edge(node, output, how);
                    }
                }
                // A set in a select list makes as many rows as it has elements, whether anybody takes them or not.
                let is_set = pg_sys::expression_returns_set(target.expr.cast());
                if is_set || target.ressortgroupref > 0 || target.resjunk || !query.distinctClause.is_null() {
                    self.queries[number].always.extend(uses.iter().copied());
                }
                let outputs = &mut self.queries[number].outputs;
                if outputs.len() <= column {
                    outputs.resize(column + 1, Vec::new());
                }
                outputs[column] = uses;
            }
        }
    }

    fn edge(&mut self, from: Node, to: Node, how: Comparison) {
        self.graph.edges.push(Edge { from, to, how, picked: false });
    }

    /// # Safety
    /// `entry` belongs to the innermost of `levels`.
    unsafe fn source(&mut self, entry: *mut pg_sys::RangeTblEntry, levels: &Levels) -> Source {
        // SAFETY: an entry's kind says which of its fields are set.
        unsafe {
            let kind = (*entry).rtekind;
            match kind {
                pg_sys::RTEKind::RTE_RELATION => {
                    self.expression((*entry).tablesample.cast(), levels);
                    self.relation(&*entry)
                }
                pg_sys::RTEKind::RTE_SUBQUERY => {
                    let query = self.query((*entry).subquery, levels);
                    self.use_of(query);
                    Source::Query(query)
                }
                pg_sys::RTEKind::RTE_JOIN => Source::Join(entry),
                pg_sys::RTEKind::RTE_CTE => {
                    if (*entry).self_reference {
                        return Source::Other("a recursive query");
                    }
                    let level = levels.scopes.len().wrapping_sub(1 + (*entry).ctelevelsup as usize);
                    let Some(owner) = levels.queries.get(level) else { return Source::Other("a WITH query") };
                    let name = CStr::from_ptr((*entry).ctename);
                    let ctes = PgList::<pg_sys::CommonTableExpr>::from_pg((**owner).cteList);
                    let Some(cte) = ctes.iter_ptr().find(|cte| CStr::from_ptr((**cte).ctename) == name) else {
                        return Source::Other("a WITH query");
                    };
                    let first_table = self.graph.tables.len();
                    let around =
                        Levels { scopes: levels.scopes[..=level].to_vec(), queries: levels.queries[..=level].to_vec() };
                    let query = self.query((*cte).ctequery.cast(), &around);
                    self.use_of(query);
                    if (*cte).cterecursive {
                        for table in &mut self.graph.tables[first_table..] {
                            table.obstacle = Some("it is read by a recursive query".to_owned());
                        }
                        // Its rows go through the recursion: what they become equals nothing.
                        let columns = self.queries[query].outputs.len();
                        for column in 0..columns {
                            self.found.push(Node::Output { query, column });
                        }
                        return Source::Other("a recursive query");
                    }
                    Source::Query(query)
                }
                pg_sys::RTEKind::RTE_FUNCTION => {
                    for function in PgList::<pg_sys::RangeTblFunction>::from_pg((*entry).functions).iter_ptr() {
                        self.expression((*function).funcexpr, levels);
                    }
                    Source::Other("a set-returning function")
                }
                pg_sys::RTEKind::RTE_TABLEFUNC => {
                    self.expression((*entry).tablefunc.cast(), levels);
                    Source::Other("a table function")
                }
                pg_sys::RTEKind::RTE_VALUES => {
                    self.expression((*entry).values_lists.cast(), levels);
                    Source::Other("a list of values")
                }
                _ => Source::Other("something that is no table"),
            }
        }
    }

    /// What a subquery needs for its rows to be there is needed by the query around it.
    fn use_of(&mut self, query: usize) {
        let always = self.queries[query].always.clone();
        self.found.extend(always);
    }

    /// # Safety
    /// `entry` is of a relation.
    unsafe fn relation(&mut self, entry: &pg_sys::RangeTblEntry) -> Source {
        let oid = entry.relid;
        if entry.relkind as u8 == pg_sys::RELKIND_VIEW {
            // SAFETY: opened with a lock that lasts as long as the reference, which the reader keeps.
            let relation = unsafe { PgRelation::with_lock(oid, pg_sys::AccessShareLock as i32) };
            // SAFETY: a view's one rule, which lives as long as the relation is open. It refers to nothing around it.
            let query = unsafe { self.query(pg_sys::get_view_query(relation.as_ptr()), &Levels::default()) };
            self.relations.push(relation);
            self.views.push(oid);
            self.use_of(query);
            return Source::Query(query);
        }
        let name = spi::qualified(oid);
        let why = match entry.relkind as u8 {
            _ if oid.to_u32() < FIRST_NORMAL_OID => Some("it is a system catalog"),
            pg_sys::RELKIND_MATVIEW => Some("it is a materialized view, whose refresh fires no triggers"),
            pg_sys::RELKIND_FOREIGN_TABLE => Some(FOREIGN),
            pg_sys::RELKIND_RELATION if entry.inh && has_children(oid) => {
                Some("other tables inherit from it, whose changes do not fire its triggers")
            }
            pg_sys::RELKIND_RELATION | pg_sys::RELKIND_PARTITIONED_TABLE => None,
            _ => Some("its changes fire no triggers"),
        };
        if !entry.tablesample.is_null() {
            self.unfollowed.push((name.clone(), "which of its rows a sample has depends on where they lie".to_owned()));
        }
        if let Some(why) = why {
            self.unfollowed.push((name, why.to_owned()));
        }
        // The table itself is followed: its other partitions have their triggers.
        if entry.relkind as u8 == pg_sys::RELKIND_PARTITIONED_TABLE && entry.inh {
            self.unfollowed.extend(foreign_partitions(oid).into_iter().map(|name| (name, FOREIGN.to_owned())));
        }
        self.graph.tables.push(Table {
            oid: oid.to_u32(),
            fires: why.is_none(),
            indexes: indexes(oid),
            obstacle: None,
            deciding: Vec::new(),
        });
        Source::Table(self.graph.tables.len() - 1)
    }

    /// Reads what a FROM clause joins, and its conditions.
    ///
    /// # Safety
    /// `node` is part of the innermost query's jointree.
    unsafe fn join(&mut self, node: *mut pg_sys::Node, levels: &Levels) {
        if node.is_null() {
            return;
        }
        // SAFETY: a node's tag says which struct it is.
        unsafe {
            if is_a(node, pg_sys::NodeTag::T_FromExpr) {
                let from = &*node.cast::<pg_sys::FromExpr>();
                let mut bound = HashSet::new();
                for item in PgList::<pg_sys::Node>::from_pg(from.fromlist).iter_ptr() {
                    self.join(item, levels);
                    in_from(item, &mut bound);
                }
                self.condition(from.quals, &bound, levels);
            } else if is_a(node, pg_sys::NodeTag::T_JoinExpr) {
                let join = &*node.cast::<pg_sys::JoinExpr>();
                self.join(join.larg, levels);
                self.join(join.rarg, levels);
                let mut bound = HashSet::new();
                // Whoever has a part in the result has met the condition, but for the side that an outer join keeps.
                if matches!(join.jointype, pg_sys::JoinType::JOIN_INNER | pg_sys::JoinType::JOIN_RIGHT) {
                    in_from(join.larg, &mut bound);
                }
                if matches!(join.jointype, pg_sys::JoinType::JOIN_INNER | pg_sys::JoinType::JOIN_LEFT) {
                    in_from(join.rarg, &mut bound);
                }
                self.condition(join.quals, &bound, levels);
            }
        }
    }

    /// Reads a condition that all rows of `bound` entries have met, which have a part in the result.
    ///
    /// # Safety
    /// `node` is an expression of the innermost query.
    unsafe fn condition(&mut self, node: *mut pg_sys::Node, bound: &HashSet<i32>, levels: &Levels) {
        if node.is_null() {
            return;
        }
        // SAFETY: a node's tag says which struct it is.
        unsafe {
            if is_a(node, pg_sys::NodeTag::T_List) {
                for part in PgList::<pg_sys::Node>::from_pg(node.cast()).iter_ptr() {
                    self.condition(part, bound, levels);
                }
            } else if is_a(node, pg_sys::NodeTag::T_BoolExpr)
                && (*node.cast::<pg_sys::BoolExpr>()).boolop == pg_sys::BoolExprType::AND_EXPR
            {
                for part in PgList::<pg_sys::Node>::from_pg((*node.cast::<pg_sys::BoolExpr>()).args).iter_ptr() {
                    self.condition(part, bound, levels);
                }
            } else if is_a(node, pg_sys::NodeTag::T_SubLink) {
                self.sub_link(&*node.cast::<pg_sys::SubLink>(), Some(bound), levels);
            } else {
                if is_a(node, pg_sys::NodeTag::T_OpExpr) {
                    let operation = &*node.cast::<pg_sys::OpExpr>();
                    if let (Some(how), Some((left, right))) =
                        (equality(operation.opno, operation.inputcollid), two(operation.args))
                    {
                        self.equal(left, right, how, how, bound, levels);
                    }
                } else if is_a(node, pg_sys::NodeTag::T_ScalarArrayOpExpr) {
                    let operation = &*node.cast::<pg_sys::ScalarArrayOpExpr>();
                    if let (true, Some(Comparison::Equal { operator, .. }), Some((left, right))) =
                        (operation.useOr, equality(operation.opno, operation.inputcollid), two(operation.args))
                    {
                        let (element, contains) = (Comparison::Element { operator }, Comparison::Contains { operator });
                        self.equal(left, without_relabelled_elements(right), element, contains, bound, levels);
                    }
                }
                self.expression(node, levels);
            }
        }
    }

    /// Both sides of a comparison that holds: `how` from left to right, `back` from right to left.
    ///
    /// # Safety
    /// As `condition`.
    unsafe fn equal(
        &mut self,
        left: *mut pg_sys::Node,
        right: *mut pg_sys::Node,
        how: Comparison,
        back: Comparison,
        bound: &HashSet<i32>,
        levels: &Levels,
    ) {
        // SAFETY: the caller's.
        let sides = unsafe { [self.column_of(left, levels), self.column_of(right, levels)] };
        for (from, to, node, how) in [(0, 1, right, how), (1, 0, left, back)] {
            let Some((own, level, entry)) = sides[from] else { continue };
            let Node::Column { table, .. } = own else {
                if let (Some((other, ..)), true) = (sides[to], level == 0 && bound.contains(&entry)) {
                    self.edge(own, other, how);
                }
                continue;
            };
            let obstacle = &mut self.graph.tables[table].obstacle;
            match sides[to] {
                Some((other, ..)) if level == 0 && bound.contains(&entry) => {
                    self.edge(own, other, how);
                }
                Some(_) if level == 0 => {
                    obstacle.get_or_insert_with(|| {
                        "it is compared in the condition of an outer join, which its rows need not meet".to_owned()
                    });
                }
                None => {
                    // SAFETY: the caller's.
                    if let Some(what) = unsafe { other_source(node, levels) } {
                        obstacle.get_or_insert_with(|| format!("it is compared with the result of {what}"));
                    }
                }
                Some(_) => {}
            }
        }
    }

    /// Reads a sub-select. As a condition that rows of the `bound` entries have met, what it compares by IN is equal.
    ///
    /// # Safety
    /// It is part of the innermost query.
    unsafe fn sub_link(&mut self, link: &pg_sys::SubLink, bound: Option<&HashSet<i32>>, levels: &Levels) {
        // SAFETY: an analysed sub-select is a query.
        unsafe {
            let query = self.query(link.subselect.cast(), levels);
            self.use_of(query);
            if link.subLinkType != pg_sys::SubLinkType::EXISTS_SUBLINK {
                let outputs: Vec<Node> = self.queries[query].outputs.iter().flatten().copied().collect();
                self.found.extend(outputs);
            }
            self.expression(link.testexpr, levels);
            if let Some(bound) = bound
                && link.subLinkType == pg_sys::SubLinkType::ANY_SUBLINK
            {
                let mut tests = Vec::new();
                if is_a(link.testexpr, pg_sys::NodeTag::T_OpExpr) {
                    tests.push(link.testexpr);
                } else if is_a(link.testexpr, pg_sys::NodeTag::T_BoolExpr) {
                    let all = &*link.testexpr.cast::<pg_sys::BoolExpr>();
                    if all.boolop == pg_sys::BoolExprType::AND_EXPR {
                        tests.extend(PgList::<pg_sys::Node>::from_pg(all.args).iter_ptr());
                    }
                }
                for test in tests.into_iter().filter(|test| is_a(*test, pg_sys::NodeTag::T_OpExpr)) {
                    let test = &*test.cast::<pg_sys::OpExpr>();
                    let (Some(how), Some((left, right))) = (equality(test.opno, test.inputcollid), two(test.args))
                    else {
                        continue;
                    };
                    let right = without_relabel(right);
                    if let (Some((node, level, entry)), true) =
                        (self.column_of(left, levels), is_a(right, pg_sys::NodeTag::T_Param))
                    {
                        let output =
                            Node::Output { query, column: (*right.cast::<pg_sys::Param>()).paramid as usize - 1 };
                        self.edge(output, node, how);
                        if level == 0 && bound.contains(&entry) {
                            self.edge(node, output, how);
                        }
                    }
                }
            }
        }
    }

    /// Collects what an expression uses, with its sub-selects.
    ///
    /// # Safety
    /// `node` is null or an expression of the innermost query.
    unsafe fn expression(&mut self, node: *mut pg_sys::Node, levels: &Levels) {
        if node.is_null() {
            return;
        }
        let mut visit = Visit { reader: self, levels };
        // SAFETY: the walker gets each node with the context that it expects, and both outlive the call.
        unsafe { walk(node, (&raw mut visit).cast()) };
    }

    /// The column that an expression is, where it is one and nothing else: its node, how many queries further out its
    /// entry is, and the entry.
    ///
    /// # Safety
    /// As `expression`.
    unsafe fn column_of(&self, node: *mut pg_sys::Node, levels: &Levels) -> Option<(Node, usize, i32)> {
        // SAFETY: a node's tag says which struct it is.
        unsafe {
            let node = without_relabel(node);
            if node.is_null() || !is_a(node, pg_sys::NodeTag::T_Var) {
                return None;
            }
            let var = &*node.cast::<pg_sys::Var>();
            levels.column(var, 0).filter(|(node, ..)| !matches!(node, Node::Column { number, .. } if *number <= 0))
        }
    }

    fn visit_var(&mut self, var: &pg_sys::Var, levels: &Levels) {
        let number = var.varattno;
        match levels.source(var.varlevelsup as usize, var.varno) {
            Some(Source::Table(table)) => self.found.push(Node::Column { table, number: number.max(WHOLE_ROW) }),
            Some(Source::Query(query)) if number > WHOLE_ROW => {
                self.found.push(Node::Output { query, column: number as usize - 1 });
            }
            Some(Source::Query(query)) => {
                let columns = self.queries[query].outputs.len();
                self.found.extend((0..columns).map(|column| Node::Output { query, column }));
            }
            Some(Source::Join(entry)) => {
                // SAFETY: a join's entry has an expression of its own query for each column.
                let expressions = unsafe { PgList::<pg_sys::Node>::from_pg((*entry).joinaliasvars) };
                let up = var.varlevelsup as usize;
                let inner = Levels {
                    scopes: levels.scopes[..levels.scopes.len() - up].to_vec(),
                    queries: levels.queries[..levels.queries.len() - up].to_vec(),
                };
                for (place, expression) in expressions.iter_ptr().enumerate() {
                    if number == WHOLE_ROW || place as i16 + 1 == number {
                        // SAFETY: as above.
                        unsafe { self.expression(expression, &inner) };
                    }
                }
            }
            Some(Source::Other(_)) | None => {}
        }
    }

    fn visit_operator(&mut self, operator: pg_sys::Oid) {
        // SAFETY: a syscache lookup in a live transaction.
        self.visit_function(unsafe { pg_sys::get_opcode(operator) });
    }

    /// Postgres takes every aggregate for immutable; the functions that it is made of may be anything.
    fn visit_aggregate(&mut self, aggregate: pg_sys::Oid) {
        self.visit_function(aggregate);
        if aggregate.to_u32() < FIRST_NORMAL_OID {
            return;
        }
        let parts = spi::run(
            "select f.oid
             from pg_catalog.pg_aggregate g
             join pg_catalog.pg_proc f on f.oid in (
                 g.aggtransfn::oid, g.aggfinalfn::oid, g.aggmtransfn::oid, g.aggminvtransfn::oid, g.aggmfinalfn::oid)
             where g.aggfnoid = $1",
            &[spi::parameter(aggregate)],
        );
        for part in (0..parts.len()).filter_map(|row| parts.get(row, 1)) {
            self.visit_function(part);
        }
    }

    fn visit_function(&mut self, function: pg_sys::Oid) {
        // SAFETY: syscache lookups in a live transaction.
        let (volatility, strange) =
            unsafe { (pg_sys::func_volatile(function) as u8, function.to_u32() >= FIRST_NORMAL_OID) };
        if strange {
            self.functions.push(function);
        }
        let name = || {
            // SAFETY: as above; the palloc'd result is copied.
            unsafe { CStr::from_ptr(pg_sys::format_procedure_qualified(function)).to_string_lossy().into_owned() }
        };
        // now(), transaction_timestamp(), statement_timestamp(), clock_timestamp(), timeofday(); age() of one argument.
        const TIMES: [u32; 7] = [1299, 2647, 2648, 2649, 274, 1386, 2059];
        if TIMES.contains(&function.to_u32()) {
            self.unfollowed.push((name(), WITH_TIME.to_owned()));
        } else if volatility == pg_sys::PROVOLATILE_VOLATILE {
            self.unfollowed.push((name(), "its result changes without any table's change".to_owned()));
        } else if strange && volatility != pg_sys::PROVOLATILE_IMMUTABLE {
            self.unfollowed.push((name(), "tables that a function reads are not known".to_owned()));
        }
    }

    /// A literal such as 'today' is the time at which the statement was analysed. In a view that is when it was created; a
    /// statement is analysed again and again.
    fn visit_constant(&mut self, constant: &pg_sys::Const) {
        let Some(text) = &self.text else { return };
        let place = usize::try_from(constant.location).ok();
        let Some(literal) = place.and_then(|place| text.to_bytes().get(place..)).map(String::from_utf8_lossy) else {
            return;
        };
        // Between quotes, or between a dollar's tags.
        let behind = if literal.starts_with('$') { 2 } else { 1 };
        if is_time(constant.consttype) && literal.split(['\'', '$']).nth(behind).is_some_and(names_the_present) {
            self.unfollowed.push(("a literal that names the present".to_owned(), WITH_TIME.to_owned()));
        }
    }

    /// As `visit_constant`, where the text becomes a time whenever it is evaluated.
    ///
    /// # Safety
    /// The conversion is part of an analysed query.
    unsafe fn visit_conversion(&mut self, conversion: &pg_sys::CoerceViaIO) {
        let node: *mut pg_sys::Node = conversion.arg.cast();
        // SAFETY: a node's tag says which struct it is; a constant of type text has such a value.
        let text = unsafe {
            if !is_a(node, pg_sys::NodeTag::T_Const) || (*node.cast::<pg_sys::Const>()).consttype != pg_sys::TEXTOID {
                return;
            }
            let constant = &*node.cast::<pg_sys::Const>();
            String::from_datum(constant.constvalue, constant.constisnull)
        };
        if is_time(conversion.resulttype) && text.is_some_and(|text| names_the_present(&text)) {
            self.unfollowed.push(("a text that names the present".to_owned(), WITH_TIME.to_owned()));
        }
    }
}

impl Levels {
    /// What an entry stands for, `up` queries further out.
    fn source(&self, up: usize, entry: i32) -> Option<Source> {
        let level = self.scopes.len().checked_sub(1 + up)?;
        self.scopes[level].borrow().get(entry as usize - 1).cloned()
    }

    /// The column that a Var is; see `Reader::column_of`.
    ///
    /// # Safety
    /// The Var belongs to the query that is `out` levels further out than the innermost.
    unsafe fn column(&self, var: &pg_sys::Var, out: usize) -> Option<(Node, usize, i32)> {
        let up = out + var.varlevelsup as usize;
        match self.source(up, var.varno)? {
            Source::Table(table) => Some((Node::Column { table, number: var.varattno }, up, var.varno)),
            Source::Query(query) if var.varattno > 0 => {
                Some((Node::Output { query, column: var.varattno as usize - 1 }, up, var.varno))
            }
            // SAFETY: a join's entry has an expression of its own query for each column.
            Source::Join(entry) if var.varattno > 0 => unsafe {
                let expressions = PgList::<pg_sys::Node>::from_pg((*entry).joinaliasvars);
                let expression = without_relabel(expressions.get_ptr(var.varattno as usize - 1)?);
                if expression.is_null() || !is_a(expression, pg_sys::NodeTag::T_Var) {
                    return None;
                }
                self.column(&*expression.cast::<pg_sys::Var>(), up)
            },
            _ => None,
        }
    }
}

struct Visit<'a> {
    reader: &'a mut Reader,
    levels: &'a Levels,
}

/// Called for each node of an expression; true would end the walk.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn walk(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    if node.is_null() {
        return false;
    }
    // SAFETY: `expression` passes a live Visit, and nothing else uses it during the walk; a node's tag says which struct
    // it is.
    unsafe {
        let visit = &mut *context.cast::<Visit>();
        let levels = visit.levels;
        match (*node).type_ {
            pg_sys::NodeTag::T_Var => {
                visit.reader.visit_var(&*node.cast::<pg_sys::Var>(), levels);
                return false;
            }
            pg_sys::NodeTag::T_SubLink => {
                visit.reader.sub_link(&*node.cast::<pg_sys::SubLink>(), None, levels);
                return false;
            }
            pg_sys::NodeTag::T_FuncExpr => visit.reader.visit_function((*node.cast::<pg_sys::FuncExpr>()).funcid),
            pg_sys::NodeTag::T_OpExpr | pg_sys::NodeTag::T_DistinctExpr | pg_sys::NodeTag::T_NullIfExpr => {
                visit.reader.visit_operator((*node.cast::<pg_sys::OpExpr>()).opno);
            }
            pg_sys::NodeTag::T_ScalarArrayOpExpr => {
                visit.reader.visit_operator((*node.cast::<pg_sys::ScalarArrayOpExpr>()).opno);
            }
            pg_sys::NodeTag::T_Aggref => visit.reader.visit_aggregate((*node.cast::<pg_sys::Aggref>()).aggfnoid),
            pg_sys::NodeTag::T_WindowFunc => {
                // Any aggregate may be called as one.
                visit.reader.visit_aggregate((*node.cast::<pg_sys::WindowFunc>()).winfnoid);
            }
            pg_sys::NodeTag::T_Const => visit.reader.visit_constant(&*node.cast::<pg_sys::Const>()),
            pg_sys::NodeTag::T_CoerceViaIO => {
                visit.reader.visit_conversion(&*node.cast::<pg_sys::CoerceViaIO>());
            }
            pg_sys::NodeTag::T_SQLValueFunction => {
                use pg_sys::SQLValueFunctionOp::{SVFOP_CURRENT_DATE, SVFOP_LOCALTIMESTAMP_N};
                let is_time = SVFOP_CURRENT_DATE..=SVFOP_LOCALTIMESTAMP_N;
                let (name, why) = match (*node.cast::<pg_sys::SQLValueFunction>()).op {
                    op if is_time.contains(&op) => ("current_timestamp or the like", WITH_TIME),
                    _ => ("current_user or the like", WITH_SESSION),
                };
                visit.reader.unfollowed.push((name.to_owned(), why.to_owned()));
            }
            _ => {}
        }
        pg_sys::expression_tree_walker(node, Some(walk), context)
    }
}

/// Collects the entries that a part of a FROM clause joins.
///
/// # Safety
/// `node` is null or part of a jointree, or of set operations.
unsafe fn in_from(node: *mut pg_sys::Node, entries: &mut HashSet<i32>) {
    if node.is_null() {
        return;
    }
    // SAFETY: a node's tag says which struct it is.
    unsafe {
        match (*node).type_ {
            pg_sys::NodeTag::T_RangeTblRef => {
                entries.insert((*node.cast::<pg_sys::RangeTblRef>()).rtindex);
            }
            pg_sys::NodeTag::T_JoinExpr => {
                let join = &*node.cast::<pg_sys::JoinExpr>();
                entries.insert(join.rtindex);
                in_from(join.larg, entries);
                in_from(join.rarg, entries);
            }
            pg_sys::NodeTag::T_FromExpr => {
                let from = &*node.cast::<pg_sys::FromExpr>();
                for item in PgList::<pg_sys::Node>::from_pg(from.fromlist).iter_ptr() {
                    in_from(item, entries);
                }
            }
            pg_sys::NodeTag::T_SetOperationStmt => {
                let both = &*node.cast::<pg_sys::SetOperationStmt>();
                in_from(both.larg, entries);
                in_from(both.rarg, entries);
            }
            _ => {}
        }
    }
}

/// The entries of the queries that set operations combine.
///
/// # Safety
/// As `in_from`.
unsafe fn leaves(node: *mut pg_sys::Node) -> Vec<i32> {
    let mut entries = HashSet::new();
    // SAFETY: the caller's.
    unsafe { in_from(node, &mut entries) };
    let mut entries: Vec<i32> = entries.into_iter().collect();
    entries.sort_unstable();
    entries
}

/// True if a row of the result has its columns from the rows that it was made of, and from no others: a LIMIT or a
/// window lets one row decide about another.
fn leads_out(query: &pg_sys::Query) -> bool {
    query.limitCount.is_null()
        && query.limitOffset.is_null()
        && !query.hasDistinctOn
        && !query.hasWindowFuncs
        && query.groupingSets.is_null()
}

/// True if rows of the result decide about each other only where they are equal in this column.
///
/// # Safety
/// The query is valid.
unsafe fn is_fixed(query: &pg_sys::Query, reference: u32) -> bool {
    if reference == 0 || !query.limitCount.is_null() || !query.limitOffset.is_null() || !query.groupingSets.is_null() {
        return false;
    }
    // SAFETY: the caller's.
    unsafe {
        let names = |list: *mut pg_sys::List| {
            PgList::<pg_sys::SortGroupClause>::from_pg(list)
                .iter_ptr()
                .any(|clause| (*clause).tleSortGroupRef == reference)
        };
        (!query.hasDistinctOn || names(query.distinctClause))
            && (!query.hasWindowFuncs
                || PgList::<pg_sys::WindowClause>::from_pg(query.windowClause)
                    .iter_ptr()
                    .all(|window| names((*window).partitionClause)))
    }
}

/// How a row of the result compares in this column with the rows that have made it what it is: those that it was gathered
/// from, and those that a window sees with it. None where that is no single equality.
///
/// # Safety
/// The target is one of the query's, which is valid.
unsafe fn gathered(query: &pg_sys::Query, target: &pg_sys::TargetEntry) -> Option<Comparison> {
    // SAFETY: the caller's; these lists have such clauses.
    unsafe {
        let windows = PgList::<pg_sys::WindowClause>::from_pg(query.windowClause);
        let partitions = windows.iter_ptr().map(|window| (*window).partitionClause);
        let lists = [query.groupClause, query.distinctClause].into_iter().chain(partitions);
        let collation = pg_sys::exprCollation(target.expr.cast());
        lists
            .flat_map(|list| PgList::<pg_sys::SortGroupClause>::from_pg(list).iter_ptr().collect::<Vec<_>>())
            .filter(|clause| target.ressortgroupref > 0 && (**clause).tleSortGroupRef == target.ressortgroupref)
            .try_fold(Comparison::Same, |how, clause| how.then(gathering((*clause).eqop, collation)?))
    }
}

/// The same for a column of set operations; UNION ALL leaves each row as it is.
///
/// # Safety
/// `node` is part of a query's set operations.
unsafe fn combined(node: *mut pg_sys::Node, column: usize) -> Option<Comparison> {
    // SAFETY: a node's tag says which struct it is; a clause and a collation belong to each column.
    unsafe {
        if node.is_null() || !is_a(node, pg_sys::NodeTag::T_SetOperationStmt) {
            return Some(Comparison::Same);
        }
        let both = &*node.cast::<pg_sys::SetOperationStmt>();
        let own = match PgList::<pg_sys::SortGroupClause>::from_pg(both.groupClauses).get_ptr(column) {
            None => Comparison::Same,
            Some(clause) => gathering((*clause).eqop, *relation::oids(both.colCollations).get(column)?)?,
        };
        combined(both.larg, column)?.then(combined(both.rarg, column)?)?.then(own)
    }
}

/// # Safety
/// `node` is null or valid.
unsafe fn without_relabel(mut node: *mut pg_sys::Node) -> *mut pg_sys::Node {
    // SAFETY: a node's tag says which struct it is.
    unsafe {
        while !node.is_null() && is_a(node, pg_sys::NodeTag::T_RelabelType) {
            node = (*node.cast::<pg_sys::RelabelType>()).arg.cast();
        }
    }
    node
}

/// An array as it was before its elements were taken for another type that they are by nature: varchar as text.
///
/// # Safety
/// As `without_relabel`.
unsafe fn without_relabelled_elements(node: *mut pg_sys::Node) -> *mut pg_sys::Node {
    // SAFETY: a node's tag says which struct it is.
    unsafe {
        let inner = without_relabel(node);
        if inner.is_null() || !is_a(inner, pg_sys::NodeTag::T_ArrayCoerceExpr) {
            return inner;
        }
        let array = &*inner.cast::<pg_sys::ArrayCoerceExpr>();
        let element = without_relabel(array.elemexpr.cast());
        if element.is_null() || !is_a(element, pg_sys::NodeTag::T_CaseTestExpr) {
            return inner;
        }
        without_relabel(array.arg.cast())
    }
}

/// What an expression's column belongs to, where that is no table: for a message.
///
/// # Safety
/// As `Reader::expression`.
unsafe fn other_source(node: *mut pg_sys::Node, levels: &Levels) -> Option<&'static str> {
    // SAFETY: the caller's.
    unsafe {
        let node = without_relabel(node);
        if node.is_null() {
            return None;
        }
        match (*node).type_ {
            pg_sys::NodeTag::T_Var => {
                let var = &*node.cast::<pg_sys::Var>();
                match levels.source(var.varlevelsup as usize, var.varno) {
                    Some(Source::Other(what)) => Some(what),
                    _ => None,
                }
            }
            pg_sys::NodeTag::T_FuncExpr | pg_sys::NodeTag::T_OpExpr | pg_sys::NodeTag::T_CoerceViaIO => {
                Some("an expression")
            }
            _ => None,
        }
    }
}

/// True for dates, times, and ranges and arrays of them.
fn is_time(kind: pg_sys::Oid) -> bool {
    let (mut category, mut preferred) = (0, false);
    // SAFETY: a syscache lookup in a live transaction, and where it writes to.
    unsafe { pg_sys::get_type_category_preferred(relation::element_of(kind).0, &raw mut category, &raw mut preferred) };
    matches!(category as u8, pg_sys::TYPCATEGORY_DATETIME | pg_sys::TYPCATEGORY_RANGE)
}

/// True if a date or time is read from this text that is another one tomorrow.
fn names_the_present(text: &str) -> bool {
    const NAMES: [&str; 4] = ["now", "today", "tomorrow", "yesterday"];
    text.split(|c: char| !c.is_ascii_alphabetic()).any(|word| NAMES.iter().any(|name| name.eq_ignore_ascii_case(word)))
}

/// # Safety
/// `arguments` is a list of nodes.
unsafe fn two(arguments: *mut pg_sys::List) -> Option<(*mut pg_sys::Node, *mut pg_sys::Node)> {
    // SAFETY: the caller's.
    let arguments = unsafe { PgList::<pg_sys::Node>::from_pg(arguments) };
    match (arguments.len(), arguments.get_ptr(0), arguments.get_ptr(1)) {
        (2, Some(left), Some(right)) => Some((left, right)),
        _ => None,
    }
}

/// Columns of a table's valid indexes on columns only, and whether each is unique. SPI must be connected.
fn indexes(table: pg_sys::Oid) -> Vec<(bool, Vec<i16>)> {
    let rows = spi::run(
        "select i.indisunique, (pg_catalog.string_to_array(i.indkey::text, ' ')::int2[])[1:i.indnkeyatts]
         from pg_catalog.pg_index i
         where i.indrelid = $1 and i.indisvalid and i.indpred is null and i.indexprs is null",
        &[spi::parameter(table)],
    );
    (0..rows.len()).filter_map(|row| Some((rows.get(row, 1)?, rows.get(row, 2)?))).collect()
}

/// True if other tables inherit from it. SPI must be connected.
fn has_children(table: pg_sys::Oid) -> bool {
    let rows =
        spi::run("select from pg_catalog.pg_inherits i where i.inhparent = $1 limit 1", &[spi::parameter(table)]);
    !rows.is_empty()
}

/// Names of a table's partitions that are foreign tables. SPI must be connected.
fn foreign_partitions(table: pg_sys::Oid) -> Vec<String> {
    // Not by pg_partition_tree, which waits for whoever alters one of them.
    let rows = spi::run(
        "with recursive tree (oid) as (
             select $1
             union all
             select i.inhrelid
             from tree t join pg_catalog.pg_inherits i on i.inhparent = t.oid and not i.inhdetachpending)
         select pg_catalog.format('%I.%I', n.nspname, c.relname)
         from tree t
         join pg_catalog.pg_class c on c.oid = t.oid and c.relkind = 'f'
         join pg_catalog.pg_namespace n on n.oid = c.relnamespace",
        &[spi::parameter(table)],
    );
    (0..rows.len()).filter_map(|row| rows.get(row, 1)).collect()
}
