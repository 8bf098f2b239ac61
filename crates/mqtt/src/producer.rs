//! The producer as the bridge needs it: the runtime's port, which also tells a topic that takes nothing from
//! a record that no topic takes. Only the latter may become a dead letter.

use throughline_model::record::Outgoing;
use throughline_runtime::ports::{Ingress, Refused};

/// Takes records and reports each one's fate by its token, see [`Ingress`].
pub trait Producer: Ingress {
    /// Hands a record over like [`Ingress::send`]. An adapter that can tell why a topic takes nothing says
    /// so here.
    ///
    /// # Errors
    /// [`NotTaken`] says whether to try again.
    fn offer(&self, record: Outgoing<'_>, token: u64) -> Result<(), NotTaken> {
        self.send(record, token).map_err(|refused| match refused {
            Refused::Full => NotTaken::Full,
            Refused::Broken(why) => NotTaken::Record(why),
        })
    }
}

/// Why a [`Producer`] did not take a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// The queue is full: try again later.
    #[error("the producer queue is full")]
    Full,
    /// The topic takes no records now, because it is missing, say, or we may not write to it: a fault of the
    /// platform. Try again later; records of other topics may be taken meanwhile.
    #[error("the topic takes no records: {0}")]
    Topic(String),
    /// The record itself cannot be sent, however often it is tried.
    #[error("the record cannot be sent: {0}")]
    Record(String),
}
