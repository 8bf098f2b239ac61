//! Which Kafka cluster, and which of the topics that ever had a name, offsets and state belong to.
//!
//! A topic that is deleted and made anew begins at offset 0 under the old name, so a position of before says
//! nothing about it: where the new topic has grown past the position, going on would skip what lies before it
//! unseen. A member of a group may not even hear of it, so a loop also looks from time to time.

use crate::clock::elapsed;
use crate::codes;
use crate::ports::Failure;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;
use throughline_model::books::Origin;
use throughline_model::record::TopicPartition;
use throughline_model::time::Timestamp;
use uuid::Uuid;

/// How often a running loop looks whether cluster and topics are still those that it began on. What it does
/// in the meantime is not lost: its offsets keep the id of the topic that is gone, so they are refused later.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// A cluster and its topics, as they are now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Incarnation {
    /// The id of the cluster.
    pub cluster_id: String,
    /// The id of each topic that exists.
    pub topic_ids: HashMap<String, Uuid>,
}

impl Incarnation {
    /// Returns what an offset in `topic`, and the state in `changelog`, belong to now.
    ///
    /// # Errors
    /// [`Failure::Dependency`] where one of them does not exist: it may be about to be made again, and only
    /// then is there something to decide.
    pub fn origin(&self, topic: &str, changelog: Option<&str>) -> Result<Origin, Failure> {
        let id = |topic: &str| {
            let id = self.topic_ids.get(topic).map(Uuid::to_string);
            id.ok_or_else(|| Failure::Dependency {
                dependency: "kafka",
                message: format!("topic `{topic}` is gone; `throughline topics apply` makes missing topics"),
            })
        };
        Ok(Origin {
            cluster: self.cluster_id.clone(),
            topic: id(topic)?,
            changelog: changelog.map(id).transpose()?,
        })
    }
}

type Ask = dyn Fn() -> Result<Incarnation, Failure> + Send + Sync;

/// Asks Kafka for the [`Incarnation`]: a closure, so that neither loops nor stores know a client.
#[derive(Clone)]
pub struct AskIncarnation(Arc<Ask>);

impl AskIncarnation {
    /// Wraps a closure that asks anew each time it is called, never from a cache.
    pub fn new(ask: impl Fn() -> Result<Incarnation, Failure> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }

    /// Asks.
    ///
    /// # Errors
    /// What the closure says: [`Failure::Dependency`] while Kafka cannot be asked.
    pub fn ask(&self) -> Result<Incarnation, Failure> {
        (self.0)()
    }

    /// Asks on a thread of its own, because a loop must not wait for it.
    fn ask_aside(&self) -> Receiver<Result<Incarnation, Failure>> {
        let (answer, answered) = channel();
        let ask = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("incarnation".to_owned());
        // Neither a thread that cannot be made nor an answer that nobody waits for is worth a word: the loop
        // asks again.
        let _ = thread.spawn(move || {
            let _ = answer.send(ask());
        });
        answered
    }
}

impl fmt::Debug for AskIncarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AskIncarnation")
    }
}

/// What a loop knows of its cluster and topics, and its looks whether that is still so.
pub(crate) struct Watch {
    group: &'static str,
    changelog: Option<String>,
    ask: AskIncarnation,
    known: Option<Incarnation>,
    asked: Option<Receiver<Result<Incarnation, Failure>>>,
    looked_at: Timestamp,
}

impl Watch {
    pub(crate) fn new(group: &'static str, changelog: Option<&str>, ask: AskIncarnation) -> Self {
        let changelog = changelog.map(str::to_owned);
        Self { group, changelog, ask, known: None, asked: None, looked_at: Timestamp(0) }
    }

    /// Says whether the loop was told by now what it began on.
    pub(crate) fn has_begun(&self) -> bool {
        self.known.is_some()
    }

    /// Asks, waits for the answer, and compares it with what was known.
    ///
    /// # Errors
    /// [`Failure::Dependency`] while Kafka cannot be asked; [`Failure::Stop`] where the cluster or a topic
    /// was replaced since this loop began.
    pub(crate) fn ask(&mut self) -> Result<Incarnation, Failure> {
        // An answer that is still to come may be older than this one.
        self.asked = None;
        let found = self.ask.ask()?;
        self.learn(found.clone())?;
        Ok(found)
    }

    /// Takes an answer that has come, or asks where it is time to; never waits.
    ///
    /// # Errors
    /// [`Failure::Stop`] where the cluster or a topic was replaced since this loop began.
    pub(crate) fn look(&mut self, now: Timestamp) -> Result<(), Failure> {
        match self.asked.as_ref().map(Receiver::try_recv) {
            Some(Err(TryRecvError::Empty)) => return Ok(()),
            Some(Ok(Ok(found))) => {
                self.asked = None;
                return self.learn(found);
            }
            // Kafka is away, which others say.
            Some(Ok(Err(_)) | Err(TryRecvError::Disconnected)) => self.asked = None,
            None => {}
        }
        if self.has_begun() && elapsed(self.looked_at, now) >= LOOK_EVERY {
            self.looked_at = now;
            self.asked = Some(self.ask.ask_aside());
        }
        Ok(())
    }

    /// Compares what was found with what is known, and adds topics that were not.
    fn learn(&mut self, found: Incarnation) -> Result<(), Failure> {
        let Some(known) = &mut self.known else {
            self.known = Some(found);
            return Ok(());
        };
        let (group, changelog) = (self.group, self.changelog.as_deref());
        if known.cluster_id != found.cluster_id {
            let why =
                format!("it began on cluster `{}`, and this is `{}`", known.cluster_id, found.cluster_id);
            return Err(replaced(group, None, &why));
        }
        for (topic, id) in found.topic_ids {
            let first = *known.topic_ids.entry(topic.clone()).or_insert(id);
            if first != id {
                let why =
                    format!("topic `{topic}` was made anew while it ran: its id was {first} and is {id}");
                // Offsets are adopted; in a changelog the group has none, so all of them are concerned.
                let named = (changelog != Some(topic.as_str())).then_some(topic.as_str());
                return Err(replaced(group, named, &why));
            }
        }
        Ok(())
    }
}

/// Compares where an offset counted with where it would be used now.
///
/// # Errors
/// [`Failure::Stop`] with the command that decides.
pub(crate) fn compare(
    group: &str,
    partition: &TopicPartition,
    next: i64,
    then: &Origin,
    now: &Origin,
) -> Result<(), Failure> {
    let offset = format!("the offset {next} in {partition}");
    if then.cluster != now.cluster {
        let why = format!("{offset} counts in cluster `{}`, and this is `{}`", then.cluster, now.cluster);
        return Err(replaced(group, None, &why));
    }
    if then.topic != now.topic {
        let why = format!("{offset} counts in a topic that is gone (id {}, now {})", then.topic, now.topic);
        return Err(replaced(group, Some(&partition.topic), &why));
    }
    match (&then.changelog, &now.changelog) {
        (Some(lost), Some(found)) if lost != found => {
            let why = format!(
                "the state of the records before {offset} was in a changelog that is gone (id {lost}, now {found})"
            );
            Err(replaced(group, None, &why))
        }
        _ => Ok(()),
    }
}

fn replaced(group: &str, topic: Option<&str>, why: &str) -> Failure {
    let topic = topic.map(|topic| format!(" --topic {topic}")).unwrap_or_default();
    Failure::Stop {
        code: codes::REPLACED,
        message: format!(
            "group `{group}` cannot go on: {why}; decide with `throughline groups adopt {group}{topic} --begin \
             earliest`, `--begin end` or `--begin here`"
        ),
    }
}
