//! Which node comes next.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// A node that failed is asked last for so long; otherwise each request that it is the turn of would wait out a timeout.
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
    health: Mutex<Health>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Health {
    /// When it last failed; None once it has answered.
    failed_at: Option<Instant>,
    /// Somebody finds out whether it works again.
    is_on_trial: bool,
}

/// What to do with a node whose turn it is, while there are others.
#[derive(Debug, PartialEq)]
pub(crate) enum Turn {
    /// Send the request.
    Use,
    /// It failed. First ask it something that costs nothing if it hangs; then [`Node::answered`] ends the trial.
    Try,
    /// It is on trial.
    Skip,
}

impl Nodes {
    pub fn new(urls: &[String]) -> Nodes {
        let nodes = urls.iter().map(|url| Node { url: url.clone(), health: Mutex::default() }).collect();
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
    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn is_avoided(&self, now: Instant) -> bool {
        let Health { failed_at, is_on_trial } = *self.health();
        is_on_trial || failed_at.is_some_and(|at| now.saturating_duration_since(at) < AVOIDED_FOR)
    }

    pub fn turn(&self) -> Turn {
        let mut health = self.health();
        match *health {
            Health { failed_at: None, .. } => Turn::Use,
            Health { is_on_trial: true, .. } => Turn::Skip,
            Health { .. } => {
                health.is_on_trial = true;
                Turn::Try
            }
        }
    }

    /// Notes whether it did what a node does. Ends a trial.
    pub fn answered(&self, yes: bool) {
        let failed_at = if yes { None } else { Some(Instant::now()) };
        *self.health() = Health { failed_at, is_on_trial: false };
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
        nodes.nodes[2].answered(false);
        assert_eq!([order(now), order(now), order(now)], ["bac", "abc", "abc"]);
        let later = Instant::now() + AVOIDED_FOR;
        assert_eq!([order(later), order(later)], ["bca", "cab"]);
        nodes.nodes[2].answered(true);
        assert_eq!(order(now), "abc");
    }

    #[test]
    fn one_request_at_a_time_finds_out_whether_a_node_works_again() {
        let nodes = Nodes::new(&["a".into(), "b".into()]);
        let node = &nodes.nodes[0];
        assert_eq!([node.turn(), node.turn()], [Turn::Use, Turn::Use]);
        node.answered(false);
        assert_eq!([node.turn(), node.turn()], [Turn::Try, Turn::Skip]);
        let later = Instant::now() + AVOIDED_FOR;
        assert_eq!(nodes.in_turn(later)[1].url, "a");
        node.answered(false);
        assert_eq!([node.turn(), node.turn()], [Turn::Try, Turn::Skip]);
        node.answered(true);
        assert_eq!([node.turn(), node.turn()], [Turn::Use, Turn::Use]);
    }
}
