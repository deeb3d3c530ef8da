//! The local waiters of one key in FIFO order.

use slab::Slab;

/// A handle to an element of [`Waiters`], valid until the element is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct WaiterId(u32);

/// A FIFO queue from which any element can be removed in O(1). It is a doubly linked list whose
/// nodes live in a slab, so a waiter needs no allocation of its own. Nodes that have left the line
/// stay in the slab until their owner collects them.
#[derive(Debug)]
pub(crate) struct Waiters<T> {
    nodes: Slab<Node<T>>,
    head: u32,
    tail: u32,
    in_line: u32,
}

#[derive(Debug)]
struct Node<T> {
    value: T,
    previous: u32,
    next: u32,
    in_line: bool,
}

const NONE: u32 = u32::MAX;

impl<T> Waiters<T> {
    pub(crate) const fn new() -> Self {
        Self {
            nodes: Slab::new(),
            head: NONE,
            tail: NONE,
            in_line: 0,
        }
    }

    /// The number of elements in line.
    pub(crate) const fn len(&self) -> usize {
        self.in_line as usize
    }

    /// Whether the line is empty.
    pub(crate) const fn is_empty(&self) -> bool {
        self.in_line == 0
    }

    /// Whether the line is empty and no element waits to be collected.
    pub(crate) fn is_unused(&self) -> bool {
        self.nodes.is_empty()
    }

    pub(crate) fn first(&self) -> Option<WaiterId> {
        (self.head != NONE).then_some(WaiterId(self.head))
    }

    /// The first element in line.
    pub(crate) fn front(&self) -> Option<&T> {
        self.first().and_then(|id| self.get(id))
    }

    /// The elements in line, from first to last.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (WaiterId, &T)> {
        let node = |index: u32| self.nodes.get(index as usize).map(|node| (index, node));
        let nodes = std::iter::successors(node(self.head), move |(_, last)| node(last.next));
        nodes.map(|(index, node)| (WaiterId(index), &node.value))
    }

    /// The elements in line for which `is_one` holds.
    pub(crate) fn find_all(&self, is_one: impl Fn(&T) -> bool) -> Vec<WaiterId> {
        self.iter()
            .filter_map(|(id, value)| is_one(value).then_some(id))
            .collect()
    }

    pub(crate) fn get(&self, id: WaiterId) -> Option<&T> {
        self.nodes.get(id.0 as usize).map(|node| &node.value)
    }

    pub(crate) fn get_mut(&mut self, id: WaiterId) -> Option<&mut T> {
        self.nodes.get_mut(id.0 as usize).map(|node| &mut node.value)
    }

    /// Appends to the end of the line.
    pub(crate) fn push_back(&mut self, value: T) -> WaiterId {
        let index = self.nodes.insert(Node {
            value,
            previous: NONE,
            next: NONE,
            in_line: false,
        }) as u32;
        self.link(index, self.tail, NONE);
        WaiterId(index)
    }

    /// Returns an element that had left the line to its front.
    pub(crate) fn return_to_front(&mut self, id: WaiterId) {
        if self.nodes.get(id.0 as usize).is_some_and(|node| !node.in_line) {
            self.link(id.0, NONE, self.head);
        }
    }

    /// Takes an element out of the line, if it is in line. Its value stays until it is removed.
    pub(crate) fn detach(&mut self, id: WaiterId) {
        self.unlink(id.0);
    }

    /// Takes an element out of the line, if it is in line, and removes it.
    pub(crate) fn remove(&mut self, id: WaiterId) -> Option<T> {
        self.unlink(id.0);
        self.nodes.try_remove(id.0 as usize).map(|node| node.value)
    }

    fn link(&mut self, index: u32, previous: u32, next: u32) {
        if let Some(node) = self.nodes.get_mut(index as usize) {
            (node.previous, node.next, node.in_line) = (previous, next, true);
            self.in_line += 1;
        }
        self.set_next(previous, index);
        self.set_previous(next, index);
    }

    fn unlink(&mut self, index: u32) {
        let Some(node) = self.nodes.get_mut(index as usize).filter(|node| node.in_line) else {
            return;
        };
        let (previous, next) = (node.previous, node.next);
        (node.previous, node.next, node.in_line) = (NONE, NONE, false);
        self.in_line -= 1;
        self.set_next(previous, next);
        self.set_previous(next, previous);
    }

    fn set_next(&mut self, index: u32, next: u32) {
        match self.nodes.get_mut(index as usize) {
            Some(node) => node.next = next,
            None => self.head = next,
        }
    }

    fn set_previous(&mut self, index: u32, previous: u32) {
        match self.nodes.get_mut(index as usize) {
            Some(node) => node.previous = previous,
            None => self.tail = previous,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        /// Any sequence of appends, pops, returns and removals produces the same line as a plain
        /// deque.
        #[test]
        fn waiters_behave_like_a_deque(steps in prop::collection::vec((0..4u8, any::<prop::sample::Index>()), 0..200)) {
            let mut line = Waiters::new();
            let mut model: VecDeque<(WaiterId, u32)> = VecDeque::new();
            let mut left: Vec<(WaiterId, u32)> = Vec::new();
            for (number, (step, index)) in steps.into_iter().enumerate() {
                let number = number as u32;
                match step {
                    0 => model.push_back((line.push_back(number), number)),
                    1 => {
                        if let Some(first) = line.first() {
                            line.detach(first);
                        }
                        left.extend(model.pop_front());
                    }
                    2 if !left.is_empty() => {
                        let entry = left.swap_remove(index.index(left.len()));
                        line.return_to_front(entry.0);
                        model.push_front(entry);
                    }
                    3 if !model.is_empty() => {
                        let entry = model.remove(index.index(model.len())).unwrap();
                        prop_assert_eq!(line.remove(entry.0), Some(entry.1));
                    }
                    _ => {}
                }
                prop_assert_eq!(line.len(), model.len());
                prop_assert_eq!(line.first(), model.front().map(|entry| entry.0));
                let all: Vec<_> = line.iter().map(|(id, value)| (id, *value)).collect();
                prop_assert_eq!(all, Vec::from(model.clone()));
            }
            for entry in left {
                prop_assert_eq!(line.remove(entry.0), Some(entry.1));
            }
            while let Some((id, number)) = model.pop_front() {
                prop_assert_eq!(line.first(), Some(id));
                prop_assert_eq!(line.remove(id), Some(number));
            }
            prop_assert!(line.is_unused());
        }
    }
}
