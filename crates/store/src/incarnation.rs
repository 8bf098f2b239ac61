//! Which Kafka cluster and which of the topics that ever had a name the stored offsets count in.

use crate::{StoreOptions, StoredOffset, error};
use throughline_runtime::ports::Failure;
use uuid::Uuid;

/// Takes the incarnation as it is now. A topic that was known and is gone is waited for: it may be about
/// to be made again, and only then is there something to decide.
pub(crate) fn refresh(options: &mut StoreOptions) -> Result<(), Failure> {
    let Some(ask) = &options.ask else { return Ok(()) };
    let now = ask.ask()?;
    if let Some(gone) = options.topic_ids.keys().find(|topic| !now.topic_ids.contains_key(*topic)) {
        return Err(Failure::Dependency {
            dependency: "kafka",
            message: format!("topic `{gone}` is gone; `throughline topics apply` makes missing topics"),
        });
    }
    (options.cluster_id, options.topic_ids) = (now.cluster_id, now.topic_ids);
    Ok(())
}

/// Returns the id of a topic as text.
pub(crate) fn topic_id(options: &StoreOptions, topic: &str) -> Result<String, Failure> {
    options.topic_ids.get(topic).map(Uuid::to_string).ok_or_else(|| Failure::Stop {
        code: error::TOPIC_UNKNOWN,
        message: format!(
            "the id of topic `{topic}` is not known, so its offsets cannot be kept; create it with \
             `throughline topics apply`"
        ),
    })
}

/// The stop of a stage whose stored offset counts in another cluster or topic.
pub(crate) fn other_incarnation(
    group: &str,
    stored: &StoredOffset,
    cluster_id: &str,
    topic_id: &str,
) -> Failure {
    Failure::Stop {
        code: error::INCARNATION,
        message: format!(
            "the offset {} of group `{group}` at {} counts in cluster `{}`, topic id {}, but this is cluster \
             `{cluster_id}`, topic id {topic_id}; decide with `throughline groups adopt {group} --topic {} --begin earliest`, `--begin end` or `--begin here`",
            stored.next, stored.partition, stored.cluster_id, stored.topic_id, stored.partition.topic
        ),
    }
}
