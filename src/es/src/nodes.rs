//! Which node comes next.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A node that could not be connected to is asked last for so long; otherwise each request that it is the turn of
/// would wait out the connect timeout.
const AVOIDED_FOR: Duration = Duration::from_secs(10);

/// The engine's nodes, in turn.
#[derive(Debug)]
pub(crate) struct Nodes {
    nodes: Vec<Node>,
    next: AtomicUsize,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub url: String,
    failed_at: Mutex<Option<Instant>>,
}

impl Nodes {
    pub fn new(urls: &[String]) -> Nodes {
        let nodes = urls.iter().map(|url| Node { url: url.clone(), failed_at: Mutex::new(None) }).collect();
        Nodes { nodes, next: AtomicUsize::new(0) }
    }

    /// Every node once: beginning one further at each call, those that failed lately behind.
    pub fn in_turn(&self, now: Instant) -> Vec<&Node> {
        let mut order: Vec<&Node> = self.nodes.iter().collect();
        if order.len() > 1 {
            let first = self.next.fetch_add(1, Ordering::Relaxed) % order.len();
            order.rotate_left(first);
            order.sort_by_key(|node| node.is_avoided(now));
        }
        order
    }
}

impl Node {
    fn is_avoided(&self, now: Instant) -> bool {
        let failed_at = self.failed_at.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        failed_at.is_some_and(|at| now.saturating_duration_since(at) < AVOIDED_FOR)
    }

    /// Notes whether it could be connected to.
    pub fn connected(&self, yes: bool) {
        let mut failed_at = self.failed_at.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *failed_at = if yes { None } else { Some(Instant::now()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_take_turns_and_a_dead_one_comes_last() {
        let nodes = Nodes::new(&["a".into(), "b".into(), "c".into()]);
        let order = |now| nodes.in_turn(now).iter().map(|node| node.url.as_str()).collect::<String>();
        let now = Instant::now();
        assert_eq!([order(now), order(now), order(now), order(now)], ["abc", "bca", "cab", "abc"]);
        nodes.nodes[2].connected(false);
        assert_eq!([order(now), order(now), order(now)], ["bac", "abc", "abc"]);
        let later = Instant::now() + AVOIDED_FOR;
        assert_eq!([order(later), order(later)], ["bca", "cab"]);
        nodes.nodes[2].connected(true);
        assert_eq!(order(now), "abc");
    }
}
