//! A bounded set of sequence numbers, kept as runs above a floor.

use serde::{Deserialize, Serialize};

/// At most this many runs are kept; when one more is needed the lowest is forgotten and the floor rises.
pub const RUNS_MAX: usize = 64;

/// At most this many closed gaps are listed; the count of their seqs goes on.
pub const CLOSED_GAPS_MAX: usize = 16;

/// Consecutive seqs, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run(pub i64, pub i64);

impl Run {
    /// Returns the number of seqs in it.
    pub const fn count(self) -> u64 {
        self.1.abs_diff(self.0).saturating_add(1)
    }
}

/// Gaps that can no longer be filled: the floor rose above them. Nobody knows whether what was missing
/// came later, because at or below the floor a message is accepted without being remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosedGaps {
    /// Missing seqs of all closed gaps.
    pub seqs: u64,
    /// The newest gaps, at most [`CLOSED_GAPS_MAX`], oldest first.
    pub ranges: Vec<Run>,
}

impl ClosedGaps {
    /// Says whether no gap was ever closed.
    pub fn is_empty(&self) -> bool {
        self.seqs == 0
    }

    fn add(&mut self, gap: Run) {
        self.seqs = self.seqs.saturating_add(gap.count());
        if self.ranges.len() == CLOSED_GAPS_MAX {
            self.ranges.remove(0);
        }
        self.ranges.push(gap);
    }
}

/// Sorted, disjoint, never adjacent runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct RunSet(Vec<Run>);

impl RunSet {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn as_slice(&self) -> &[Run] {
        &self.0
    }

    pub(super) fn last(&self) -> Option<i64> {
        self.0.last().map(|run| run.1)
    }

    pub(super) fn contains(&self, seq: i64) -> bool {
        let at = self.0.partition_point(|run| run.1 < seq);
        self.0.get(at).is_some_and(|run| run.0 <= seq)
    }

    /// Adds `seq`; says whether it was absent.
    pub(super) fn insert(&mut self, seq: i64) -> bool {
        // Nearly every message is the successor of the last one: no search, no allocation.
        if let Some(last) = self.0.last_mut()
            && last.1.checked_add(1) == Some(seq)
        {
            last.1 = seq;
            return true;
        }
        let at = self.0.partition_point(|run| run.1 < seq);
        if self.0.get(at).is_some_and(|run| run.0 <= seq) {
            return false;
        }
        let joins_below = at > 0 && self.0[at - 1].1 + 1 == seq;
        let joins_above = self.0.get(at).is_some_and(|run| run.0 - 1 == seq);
        match (joins_below, joins_above) {
            (true, true) => {
                self.0[at - 1].1 = self.0[at].1;
                self.0.remove(at);
            }
            (true, false) => self.0[at - 1].1 = seq,
            (false, true) => self.0[at].0 = seq,
            (false, false) => self.0.insert(at, Run(seq, seq)),
        }
        true
    }

    /// Takes `seq` out; says whether it was there.
    pub(super) fn remove(&mut self, seq: i64) -> bool {
        let at = self.0.partition_point(|run| run.1 < seq);
        let Some(run) = self.0.get(at).copied().filter(|run| run.0 <= seq) else { return false };
        match (run.0 == seq, run.1 == seq) {
            (true, true) => {
                self.0.remove(at);
            }
            (true, false) => self.0[at].0 += 1,
            (false, true) => self.0[at].1 -= 1,
            (false, false) => {
                self.0[at].1 = seq - 1;
                self.0.insert(at + 1, Run(seq + 1, run.1));
            }
        }
        true
    }

    fn cut_at_or_below(&mut self, floor: i64) {
        self.0.retain(|run| run.1 > floor);
        if let Some(first) = self.0.first_mut() {
            first.0 = first.0.max(floor + 1);
        }
    }
}

/// The seqs received in one generation of one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// At or below this nothing is remembered; −1 where everything is.
    #[serde(default = "no_floor", skip_serializing_if = "is_no_floor")]
    pub(super) floor: i64,
    #[serde(default)]
    pub(super) runs: RunSet,
    #[serde(default, skip_serializing_if = "RunSet::is_empty")]
    pub(super) open: RunSet,
    #[serde(default, skip_serializing_if = "ClosedGaps::is_empty")]
    pub(super) closed: ClosedGaps,
}

const fn no_floor() -> i64 {
    -1
}

const fn is_no_floor(floor: &i64) -> bool {
    *floor == no_floor()
}

impl Default for Received {
    fn default() -> Self {
        Self {
            floor: no_floor(),
            runs: RunSet::default(),
            open: RunSet::default(),
            closed: ClosedGaps::default(),
        }
    }
}

impl Received {
    /// Returns the runs, lowest first; at most [`RUNS_MAX`].
    pub fn runs(&self) -> &[Run] {
        self.runs.as_slice()
    }

    /// Returns the runs of seqs that were dead-lettered and not replayed with success since; at most
    /// [`RUNS_MAX`].
    pub fn open(&self) -> &[Run] {
        self.open.as_slice()
    }

    /// Returns the floor, or `None` where every seq is remembered.
    pub fn floor(&self) -> Option<i64> {
        (self.floor > no_floor()).then_some(self.floor)
    }

    /// Returns the gaps that were given up when the floor rose.
    pub fn closed(&self) -> &ClosedGaps {
        &self.closed
    }

    /// Remembers `seq`, raising the floor where the bound demands it.
    pub(super) fn insert(&mut self, seq: i64) {
        self.runs.insert(seq);
        if self.runs.0.len() > RUNS_MAX {
            let lowest = self.runs.0[0].1;
            self.raise_floor(lowest);
        }
    }

    /// Remembers `seq` as received but open. Where there are too many open runs the floor rises over the
    /// lowest: a replay of it is then accepted with the flag of the floor, rather than taken for seen.
    pub(super) fn insert_open(&mut self, seq: i64) {
        self.insert(seq);
        if seq <= self.floor {
            return;
        }
        self.open.insert(seq);
        if self.open.0.len() > RUNS_MAX {
            let lowest = self.open.0[0].1;
            self.raise_floor(lowest);
        }
    }

    fn raise_floor(&mut self, floor: i64) {
        let mut below = self.floor;
        for run in &self.runs.0 {
            if below >= floor || run.0 > floor {
                break;
            }
            // A device may count from 0 or from 1, so seq 0 missing at the very start is no gap.
            let starts_at_one = below == no_floor() && run.0 == 1;
            if run.0 > below + 1 && !starts_at_one {
                self.closed.add(Run(below + 1, run.0 - 1));
            }
            below = run.1;
        }
        self.floor = floor;
        self.runs.cut_at_or_below(floor);
        self.open.cut_at_or_below(floor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_split_and_stay_sorted() {
        let mut set = RunSet::default();
        for seq in [5, 7, 6, 1, 2, 9] {
            assert!(set.insert(seq), "{seq}");
        }
        assert!(!set.insert(6));
        assert_eq!(set.as_slice(), [Run(1, 2), Run(5, 7), Run(9, 9)]);
        assert!(set.remove(6) && !set.remove(6) && !set.remove(3));
        assert_eq!(set.as_slice(), [Run(1, 2), Run(5, 5), Run(7, 7), Run(9, 9)]);
    }

    #[test]
    fn the_largest_seq_neither_overflows_nor_repeats() {
        let mut set = RunSet::default();
        assert!(set.insert(i64::MAX - 1) && set.insert(i64::MAX) && !set.insert(i64::MAX) && set.insert(0));
        assert_eq!(set.as_slice(), [Run(0, 0), Run(i64::MAX - 1, i64::MAX)]);
    }

    #[test]
    fn the_65th_run_raises_the_floor_and_closes_the_gap_below_the_forgotten_run() {
        let mut received = Received::default();
        for seq in 0..=64 {
            received.insert(10 + seq * 10);
        }
        assert_eq!(received.floor(), Some(10));
        assert_eq!(received.runs().len(), RUNS_MAX);
        assert_eq!(*received.closed(), ClosedGaps { seqs: 10, ranges: vec![Run(0, 9)] });
    }

    #[test]
    fn too_many_open_runs_raise_the_floor_too() {
        let mut received = Received::default();
        for seq in 1..=200 {
            match seq % 2 {
                0 => received.insert(seq),
                _ => received.insert_open(seq),
            }
        }
        assert_eq!(received.open().len(), RUNS_MAX);
        assert_eq!(received.floor(), Some(71));
        assert_eq!(received.runs(), [Run(72, 200)]);
        assert!(received.closed().is_empty(), "nothing was missing");
    }
}
