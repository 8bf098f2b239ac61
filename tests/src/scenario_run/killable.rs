//! A producer whose process dies at a commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use throughline_model::record::Outbox;
use throughline_runtime::ports::{Advance, Failure, Transactions};
use throughline_testkit::KILLED;

/// Decides that the process dies at its next commit.
#[derive(Clone, Debug, Default)]
pub struct KillSwitch(Arc<AtomicBool>);

impl KillSwitch {
    /// Lets the next commit be the end.
    pub fn arm(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Passes everything on until the kill. A kill between two records is the easy case: nothing has left the
/// process. At the commit outputs and state lie in Kafka already, in a transaction that the successor must
/// end, and the offsets do not.
pub struct Killable<T> {
    inner: T,
    switch: KillSwitch,
}

impl<T> Killable<T> {
    /// Makes `inner` mortal.
    pub fn new(inner: T, switch: KillSwitch) -> Self {
        Self { inner, switch }
    }
}

impl<T: Transactions> Transactions for Killable<T> {
    fn send(&mut self, outbox: &Outbox) -> Result<(), Failure> {
        self.inner.send(outbox)
    }

    fn commit(&mut self, advances: &[Advance]) -> Result<(), Failure> {
        if self.switch.0.load(Ordering::Relaxed) {
            return Err(Failure::Stop { code: KILLED, message: "the process was killed".to_owned() });
        }
        self.inner.commit(advances)
    }

    fn reset(&mut self) -> Result<(), Failure> {
        self.inner.reset()
    }
}
